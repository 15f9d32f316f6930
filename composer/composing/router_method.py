"""compose() with a router in the place of a search: which names and options it takes, and what it cannot do with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraweave import registry
from loraweave.composer.refine.routed import router_name
from loraweave.errors import WeightingError
from loraweave.hub.whole_number import require_whole
from loraweave.registry import nearest
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.routing.learned_router import LearnedRouter
from loraweave.routers.routing.token_router import TokenRouter, option_names
from loraweave.types import Router

# what compose() adds to the options of a router that is trained
TRAINING = ("steps", "lr")


def routes(method: str | Router) -> bool:
    """Whether this is a router, or the name of one. Raises WeightingError for what is neither a name nor a router."""
    if isinstance(method, str):
        return _class_of(method) is not None
    if isinstance(method, MixtureWeights) or not callable(getattr(method, "weights", None)):
        raise WeightingError(
            f"method is {method!r}; give the name of a search or a router, or a router that was made. Known weights "
            "go to method='manual' as weights={name: weight}"
        )
    return True


def is_trained(method: str | Router) -> bool:
    """Whether compose() trains the router of that name on the examples; one that is given is taken as it is."""
    found = _class_of(method) if isinstance(method, str) else None
    return found is not None and issubclass(found, LearnedRouter)


def check_router(method: str | Router, options: Mapping[str, Any], unused: Mapping[str, Any], *, from_hub: bool) -> None:
    """Raises WeightingError for what cannot be done: `unused` are arguments for searches, None or 0 where not given."""
    name, known = router_name(method), _options(method)
    if from_hub and not isinstance(method, str):
        raise WeightingError(
            f"a router {name!r} that was made already is for its own experts: pass the pool that it was made for, as in "
            "hub.pool(router.experts), and not a hub"
        )
    for option in options:
        if option not in known:
            has = ", ".join(known) or "no options"
            raise WeightingError(f"method {name!r} has no option {option!r}{nearest(option, known)}; it has {has}")
    if "steps" in options:
        require_whole(f"steps of method {name!r}", options["steps"], 1, WeightingError)
    for argument, value in unused.items():
        if value:
            raise WeightingError(
                f"{argument}={value!r} is for searches of weights, but {name!r} is a router, which weighs every token by "
                f"itself: leave {argument} out"
            )


def _options(method: str | Router) -> list[str]:
    """Those that a router of that name has, and its training; none of one that was made."""
    found = _class_of(method) if isinstance(method, str) else None
    if found is None:
        return []
    if not issubclass(found, LearnedRouter):
        return option_names(found)
    if found.needs_experts:
        raise WeightingError(
            f"router {method!r} learns from rows that name their expert, and a task's examples name none: fit() one on the "
            "experts' own data, and pass it as method=router"
        )
    return [*option_names(found), *TRAINING]


def _class_of(name: str) -> type[TokenRouter] | None:
    if name not in registry.names("routers"):
        return None
    found = registry.get("routers", name)
    return found if isinstance(found, type) and issubclass(found, TokenRouter) else None
