"""compose() with a router in the place of a search: which names and options it takes, and what it cannot do with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from loraweave import registry
from loraweave.errors import WeightingError
from loraweave.hub.whole_number import is_whole
from loraweave.registry import nearest
from loraweave.routers.routing.learned_router import LearnedRouter
from loraweave.routers.routing.make import router_class
from loraweave.routers.routing.token_router import TokenRouter, option_names

# what compose() adds to the options of a router that is trained
TRAINING = ("steps", "lr")


def router_type(method: str | TokenRouter) -> type[TokenRouter] | None:
    """The class of a router, or of the name of one; None for the name of something else."""
    if isinstance(method, TokenRouter):
        return type(method)
    if method not in registry.names("routers"):
        return None
    found = registry.get("routers", method)
    return found if isinstance(found, type) and issubclass(found, TokenRouter) else None


def is_trained(method: str | TokenRouter) -> TypeGuard[str]:
    """Whether compose() trains the router of that name on the examples; one that is given is taken as it is."""
    found = router_type(method)
    return isinstance(method, str) and found is not None and found.learned


def check_router(
    method: str | TokenRouter, options: Mapping[str, Any], unused: Mapping[str, Any], *, from_hub: bool
) -> None:
    """Raises WeightingError for what cannot be done: `unused` are arguments for searches, None or 0 where not given."""
    if isinstance(method, TokenRouter):
        name, known = method.name, []
        if from_hub:
            raise WeightingError(
                f"a router {name!r} that was made already is for its own experts: pass the pool that it was made for, as in "
                "hub.pool(router.experts), and not a hub"
            )
    else:
        name, found = method, router_class(method)
        known = [*option_names(found), *(TRAINING if found.learned else ())]
        if issubclass(found, LearnedRouter) and found.needs_experts:
            raise WeightingError(
                f"router {name!r} learns from rows that name their expert, and a task's examples name none: fit() one on "
                "the experts' own data, and pass it as method=router"
            )
    for option in options:
        if option not in known:
            has = ", ".join(known) or "no options"
            raise WeightingError(f"method {name!r} has no option {option!r}{nearest(option, known)}; it has {has}")
    steps = options.get("steps")
    if "steps" in options and not is_whole(steps, 1):
        raise WeightingError(f"steps of method {name!r} is {steps!r}; it must be a whole number of at least 1")
    for argument, value in unused.items():
        if value:
            raise WeightingError(
                f"{argument}={value!r} is for searches of weights, but {name!r} is a router, which weighs every token by "
                f"itself: leave {argument} out"
            )
