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
from loraweave.routers.routing.reading import folder_of, read_router, read_saved
from loraweave.routers.routing.token_router import TokenRouter, option_names


def router(
    name: str | Path,
    pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> TokenRouter:
    """The router of that name for the experts of a pool; or a saved one: of a folder, or of `owner/name` of the model hub.

    A saved router has its options, and is for the experts that it was saved with, which its `pool` has where they were saved
    too. With `pool` it is for the experts of that one, in whatever order and beside whatever others (`TokenRouter.onto`).

    Raises UnknownName, which names near misses, for no router's name, WeightingError for an option that the router has not
    and for a pool without its experts, AdapterNotFound for what holds no router, AdapterCorrupt for damaged files,
    AdapterUnsupported for those of a newer version, and what a download raises.
    """
    if not isinstance(name, str | Path) or name == "":
        raise UnknownName(f"{name!r} is no router; give a name of {', '.join(router_names())}, or the folder of a saved one")
    experts = pool if pool is None or isinstance(pool, ExpertPool) else ExpertPool(pool)
    if isinstance(name, Path) or "/" in name or (name not in registry.names("routers") and Path(name).is_dir()):
        if options:
            raise WeightingError(f"a saved router has its options already: leave out {', '.join(options)}")
        folder = folder_of(name, revision=revision, token=token, local_files_only=local_files_only)
        saved = read_saved(folder)
        found = read_router(folder, saved, router_class(saved.name))
        return found if experts is None else found.onto(experts)
    made_of = router_class(name)
    if experts is None:
        raise WeightingError(f"router {name!r} is made for the experts of a pool: pass one, or the folder of a saved router")
    for option in options:
        if option not in (known := option_names(made_of)):
            has = ", ".join(known) or "none"
            raise WeightingError(f"router {name!r} has no option {option!r}{registry.nearest(option, known)}; it has {has}")
    # what is not being trained answers alike every time
    return made_of(experts, **options).eval()


def router_class(name: str) -> type[TokenRouter]:
    """The class of that name. UnknownName for none, and for a search, which makes weights of a task and no router."""
    if name not in registry.names("routers"):
        known = router_names()
        raise UnknownName(f"no router {name!r}{registry.nearest(name, known)}; there are {', '.join(known)}")
    found = _found(name)
    if not _is_router(found):
        raise UnknownName(
            f"{name!r} searches for the weights of a task and is no router: compose(method={name!r}) runs it; routers are "
            f"{', '.join(router_names())}"
        )
    return found  # type: ignore[no-any-return]


def router_names() -> list[str]:
    """The names of the routers that look at the input; each file of the registry is imported."""
    return [name for name in registry.names("routers") if _is_router(_found(name))]


def _found(name: str) -> Any:
    found = registry.get("routers", name)
    # a search may have a router beside it that has the same formula for each input
    return getattr(found, "token_router", found)


def _is_router(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, TokenRouter)
