"""A router by its name for a pool, or as it was saved in a folder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraweave import registry
from loraweave.errors import UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.token_router import TokenRouter, option_names


def router(
    name: str | Path, pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter] | None = None, **options: Any
) -> TokenRouter:
    """The router of that name, for the experts of a pool; or the one that `save_pretrained` wrote to a folder.

    Raises UnknownName, which names near misses, for what is neither, WeightingError for an option that the router has not.
    """
    found = router_class(str(name))
    if pool is None:
        raise WeightingError(f"router {name!r} is made for the experts of a pool: pass one, or the folder of a saved router")
    for option in options:
        if option not in (known := option_names(found)):
            has = ", ".join(known) or "none"
            raise WeightingError(f"router {name!r} has no option {option!r}{registry.nearest(option, known)}; it has {has}")
    return found(pool if isinstance(pool, ExpertPool) else ExpertPool(pool), **options)


def router_class(name: str) -> type[TokenRouter]:
    """The class of that name. UnknownName for none, and for a search, which makes weights of a task and no router."""
    known = router_names()
    if name not in registry.names("routers"):
        raise UnknownName(f"no router {name!r}{registry.nearest(name, known)}; there are {', '.join(known)}")
    found = registry.get("routers", name)
    if not _is_router(found):
        raise UnknownName(
            f"{name!r} searches for the weights of a task and is no router: compose(method={name!r}) runs it; routers are "
            f"{', '.join(known)}"
        )
    return found  # type: ignore[no-any-return]


def router_names() -> list[str]:
    """The names of the routers that look at the input; each file of the registry is imported."""
    return [name for name in registry.names("routers") if _is_router(registry.get("routers", name))]


def _is_router(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, TokenRouter)
