"""A solver of routers/ by its name, with the options that a user may set and what compose() supplies."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from loraweave import registry
from loraweave.errors import LoraweaveError, UnknownName, WeightingError
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.search.solver import Solver

# ways of compose() that are no solvers
OTHER_WAYS = ("auto", "base", "best_single")
# what compose() gives a solver that asks for it: retrieval scores, the pool's layers, the weights of "manual"
SUPPLIED = ("scores", "layers", "weights")
# how many of the best adapters share the weight 1 at a start of that name; what else a search can begin at
BEST = {"best_single": 1, "best_three": 3}
STARTS = (*BEST, "base", "uniform", "retrieval")
# a budget for any options
PLENTY = 10**9
_LIMITS = ("experts", "budget", "seconds", "seed")


def solver_class(method: str) -> type[Solver]:
    """The class of that name; UnknownName, which names near misses, for one that compose() cannot use."""
    known = (*OTHER_WAYS, *registry.names("routers"))
    if method not in known:
        hint = registry.nearest(method, known)
        raise UnknownName(f"no method {method!r} to compose with{hint}; there are {', '.join(sorted(known))}")
    found = registry.get("routers", method)
    if not (isinstance(found, type) and issubclass(found, Solver)):
        raise UnknownName(f"router {method!r} does not search for weights: activate() it instead of composing with it")
    return found


def own_options(found: type[Solver]) -> list[str]:
    """The names of the options that a user may set, `start` among them where the solver has one."""
    parameters = list(inspect.signature(found).parameters)
    return [name for name in parameters if name not in (*_LIMITS, *SUPPLIED)]


def takes(found: type[Solver], name: str) -> bool:
    """Whether the solver's __init__ has an argument of that name."""
    return name in inspect.signature(found).parameters


def check_options(method: str, options: Mapping[str, Any], seed: int, *, from_hub: bool) -> None:
    """Raises WeightingError or UnknownName for an option that the method does not have, and for values of no use to it."""
    known = [] if method in OTHER_WAYS else own_options(solver_class(method))
    for name, value in options.items():
        if name not in known:
            hint = registry.nearest(name, known)
            has = ", ".join(known) if known else "no options"
            raise WeightingError(f"method {method!r} has no option {name!r}{hint}; it has {has}")
        wanted = str(inspect.signature(solver_class(method)).parameters[name].annotation)
        # a start may have a name, whatever the solver takes
        if isinstance(value, str) and "str" not in wanted and name not in ("start", "groups"):
            raise WeightingError(f"option {name!r} of method {method!r} is the text {value!r}; it must be {wanted}")
    if not isinstance(options.get("groups", {}), Mapping | None):
        raise WeightingError(f"groups is {options['groups']!r:.80}; give {{name: [layers]}}")
    _check_start(options.get("start"), from_hub)
    if method not in OTHER_WAYS and solver_class(method).learns:
        _try_options(method, options, seed)


def _check_start(start: Any, from_hub: bool) -> None:
    if isinstance(start, str) and start not in STARTS:
        hint = registry.nearest(start, STARTS)
        raise UnknownName(f"no start {start!r} of a search{hint}; there are {', '.join(STARTS)}, or give weights")
    if start == "retrieval" and not from_hub:
        raise WeightingError("start='retrieval' takes the softmax of retrieval scores, so it needs a hub, not a pool")
    if not isinstance(start, str | Mapping | MixtureWeights | None):
        raise WeightingError(f"start is {start!r:.80}; give {{name: weight}}, or one of {', '.join(STARTS)}")


def _try_options(method: str, options: Mapping[str, Any], seed: int) -> None:
    """A solver says itself what it cannot use: this makes one of two experts, with all but what depends on the experts."""
    own = {name: value for name, value in options.items() if name not in ("start", "groups")}
    found, supplied = solver_class(method), {"layers": ["layer"]}
    try:
        make_solver(found, ("a", "b"), budget=PLENTY, seconds=None, seed=seed, supplied=supplied, options=own)
    except LoraweaveError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r:.40}" for name, value in own.items())
        raise WeightingError(f"the options of method {method!r} are {given}, and cannot be used: {error}") from error


def make_solver(
    found: type[Solver],
    experts: Sequence[str],
    *,
    budget: int | None,
    seconds: float | None,
    seed: int,
    supplied: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Solver:
    """The solver with its limits; of `supplied` (also `start`) it gets what it takes and the options do not say."""
    arguments = {name: value for name, value in supplied.items() if takes(found, name)}
    arguments |= options
    limits = {"budget": budget, "seconds": seconds, "seed": seed}
    arguments |= {name: value for name, value in limits.items() if takes(found, name)}
    return found(experts, **arguments)
