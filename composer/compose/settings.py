"""The arguments of compose(), checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import loraweave.registry as registry
from loraweave.common.checks import is_whole, require_whole
from loraweave.common.options import options_of, require_known
from loraweave.common.rows import GivenRows, read_inputs
from loraweave.composer.compose.loss import Penalty
from loraweave.composer.compose.user_loss import Examples
from loraweave.errors import InvalidTask, LoraweaveError, ScopeError, UnknownName, WeightingError
from loraweave.hub.licenses import require_one_work, stated_license
from loraweave.hub.pool import ExpertPool
from loraweave.registry import get, nearest
from loraweave.routers.searches._solver import Solver
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._router import TokenRouter, option_names
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router, Task

# what a search's weights mean, as the name of a merge method
SPACES = {"deltas": "linear", "factors": "factor_sum"}
# a race pays for its folds out of one budget
FOLDS, FOLDS_OF_A_RACE = 3, 2


@dataclass(frozen=True)
class Settings:
    """The arguments of compose() that say how to search."""

    method: str | Router
    k: int
    budget: int | None
    seconds: float | None
    seed: int
    folds: int
    space: str | None
    weights: Mapping[str, float] | None
    objective: str | Callable[[Any, Examples], float] | None
    inputs: Sequence[str] | None
    l1: float | None
    l2: float
    sparsity: float
    checkpoint: Path | None
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_licenses: bool = False

    @classmethod
    def of(cls, *, folds: int | None, checkpoint: str | Path | None, inputs: GivenRows | None, **arguments: Any) -> Settings:
        """The arguments of compose() by name. WeightingError for a checkpoint that is no path, InvalidTask for inputs."""
        if not isinstance(checkpoint, str | PathLike | None):
            raise WeightingError(f"checkpoint is {checkpoint!r:.80}; give the path of a folder")
        if folds is None:
            folds = FOLDS_OF_A_RACE if arguments["method"] == "auto" else FOLDS
        texts = None if inputs is None else read_inputs(inputs)
        return cls(folds=folds, checkpoint=None if checkpoint is None else Path(checkpoint), inputs=texts, **arguments)

    @property
    def name(self) -> str:
        """The method's name."""
        return router_name(self.method)

    @property
    def routes(self) -> bool:
        """Whether a router makes the weights, and no search."""
        return routes(self.method)

    @property
    def learns(self) -> bool:
        """Whether the examples have a say in the weights, so that some must be held out to judge them."""
        if self.routes:
            return is_trained(self.method)
        if self.method in OTHER_WAYS:
            return self.method == "auto"
        return solver_class(self.name).learns

    @property
    def _loss(self) -> str | Callable[[Any, Examples], float] | None:
        """What the search minimises; None where nothing is searched."""
        if not self.learns or self.routes:
            return None
        return self.objective or ("cross_entropy" if self.method == "auto" else solver_class(self.name).loss)

    @property
    def merge_method(self) -> str | None:
        """What the search's weights mean; None for what the search itself says."""
        return None if self.space is None else SPACES[self.space]

    def _for_searches(self) -> dict[str, Any]:
        """The arguments that mean nothing to a router."""
        names = ("seconds", "space", "objective", "inputs", "l1", "l2", "sparsity")
        return {name: getattr(self, name) for name in names}

    @property
    def _named_loss(self) -> str | None:
        """The objective's name, if it has one; also an objective given to a method that does not search."""
        loss = self._loss if self.objective is None else self.objective
        return loss if isinstance(loss, str) else None

    def can_run(self, method: str) -> bool:
        """Whether the objective gives the search of that name the gradients that it needs."""
        if not solver_class(method).needs_gradients:
            return True
        smooth = not callable(self.objective) and self.objective != "exact_match"
        return smooth and self.merge_method in (None, "linear")

    def require_licenses(self, pool: ExpertPool) -> None:
        """Raises InvalidLicense if the composition would combine adapters whose licenses exclude each other.

        A single adapter, the base, and mixtures that a router makes live combine nothing.
        """
        weights = {name: weight for name, weight in (self.weights or dict.fromkeys(pool.names)).items() if weight != 0.0}
        alone = self.method in ("base", "best_single") or list(weights.values()) == [1.0]
        if not (alone or self.routes or self.allow_licenses):
            require_one_work((name, stated_license(pool[name].card.get("license"))) for name in weights)

    def check(self, task: Task, *, from_hub: bool) -> None:
        """Raises UnknownName, WeightingError or InvalidTask for arguments that cannot work, without looking at a model."""
        if not isinstance(task, Task):
            raise InvalidTask(f"the task is {task!r:.80}; give lw.Task([(input, target), ...], instruction=...)")
        self._check_numbers()
        if self.routes:
            check_router(self.method, self.options, self._for_searches(), from_hub=from_hub)
        else:
            self._check_search(from_hub)
        self._check_weights()
        self._check_objective(task)
        self._check_examples(task)

    def _check_numbers(self) -> None:
        for name, value, least in (("k", self.k, 1), ("folds", self.folds, 0), ("seed", self.seed, 0)):
            require_whole(name, value, least, WeightingError)
        if self.budget is not None and not is_whole(self.budget, 1):
            raise WeightingError(f"budget is {self.budget!r} evaluations; it must be a whole number of at least 1")
        for name, number in (("seconds", self.seconds), ("l1", self.l1), ("l2", self.l2), ("sparsity", self.sparsity)):
            if number is not None and not isinstance(number, int | float):
                raise WeightingError(f"{name} is {number!r}; it must be a number")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise WeightingError(f"seconds is {self.seconds!r}; it must be above 0, and finite")
        Penalty(self.l1 or 0.0, self.l2, self.sparsity)
        if self.checkpoint is not None and self.checkpoint.is_file():
            raise WeightingError(f"checkpoint is {str(self.checkpoint)!r}, which is a file; name a folder")

    def _check_search(self, from_hub: bool) -> None:
        searches = self.method not in OTHER_WAYS
        if searches and takes(solver_class(self.name), "scores") and not from_hub:
            raise WeightingError(f"method {self.method!r} weighs by retrieval scores, so it needs a hub, not a pool")
        if self.space is not None and self.space not in SPACES:
            hint = nearest(self.space, SPACES)
            raise UnknownName(f"no space {self.space!r} to compose with{hint}; there are {', '.join(SPACES)}")
        if self.budget is None and self.seconds is None and (searches or self.method == "auto"):
            raise WeightingError("a search needs a budget of evaluations, or of seconds, or both")
        check_options(self.name, self.options, self.seed, from_hub=from_hub)
        if searches and not self.can_run(self.name):
            given = "a function" if callable(self.objective) else repr(self.objective or "cross_entropy")
            where = "" if self.space is None else f" in space {self.space!r}"
            raise WeightingError(
                f"method {self.name!r} follows gradients, but there are no gradients of {given}{where}: "
                "take 'cross_entropy', 'labels' or 'entropy' in space 'deltas', or a method that needs none, as 'lorahub'"
            )

    def _check_weights(self) -> None:
        if (self.method == "manual") != (self.weights is not None):
            raise WeightingError("method 'manual' takes weights={name: weight}, and no other method does")
        if self.weights is not None and not isinstance(self.weights, Mapping | MixtureWeights):
            raise WeightingError(f"weights are {self.weights!r:.80}; give {{name: weight}}")

    def _check_objective(self, task: Task) -> None:
        if not (self.objective is None or isinstance(self.objective, str) or callable(self.objective)):
            raise WeightingError(
                f"objective is {self.objective!r}; give the name of one, or a function of (model, examples)"
            )
        if self.inputs is not None and self._loss != "entropy":
            given = "a function" if callable(self._loss) else repr(self._loss)
            raise InvalidTask(
                f"inputs without targets are for objective 'entropy', but method {self.name!r} has {given}: pass "
                "objective='entropy', or leave inputs out"
            )
        if self.inputs is not None and not self.inputs:
            raise InvalidTask("inputs are []; give at least one text")
        if self._named_loss is not None:
            kind = get("objectives", self._named_loss)
            if self._loss is not None and self.inputs is None:
                # the kind itself refuses tasks that it cannot score
                kind(task)

    def _check_examples(self, task: Task) -> None:
        if not task.examples:
            self._check_inputs_alone()
            return
        if self.learns and self.folds and len(task.examples) < 2:
            raise InvalidTask("one example cannot be both searched on and held out: give two or more, or pass folds=0")
        if self.learns and self.folds == 1:
            raise WeightingError("folds is 1, which would hold out every example; pass 2 or more, or 0 for none")

    def _check_inputs_alone(self) -> None:
        """Raises where examples are needed: a search by entropy runs without any, but comparisons and some starts do not."""
        if self.inputs is None or self.method == "auto":
            raise InvalidTask(
                "the task has no examples; give at least two (input, target) pairs, or inputs=[...] to a search by "
                "'entropy', as method='adamerging' is"
            )
        start = self.options.get("start", solver_class(self.name).begins(self.options))
        if isinstance(start, str) and start in BEST:
            raise WeightingError(
                f"start {start!r} is found on examples, and the task has none: give start='uniform', or weights as the start"
            )


def router_name(router: str | Router) -> str:
    """The router's name in the registry, or else that of its class. A name is returned as it is."""
    if isinstance(router, str):
        return router
    return router.name if isinstance(router, TokenRouter) else type(router).__name__


def require_no_router(router: Router | None, verb: str) -> None:
    """Raises ScopeError where there is a router: its weights depend on the input, and `verb` needs some that do not."""
    if router is not None:
        raise ScopeError(
            f"a composition by router {router_name(router)!r} cannot {verb}: its weights depend on the input. It answers "
            "live, save_pretrained() keeps router and adapters, and engine.activate(composition.weights) does the same "
            "elsewhere; for weights that can be merged, compose() with a search"
        )


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
    """Whether compose() trains the router of that name on the examples; a router object is used as it is."""
    found = _class_of(method)
    return found is not None and issubclass(found, LearnedRouter)


def check_router(method: str | Router, options: Mapping[str, Any], unused: Mapping[str, Any], *, from_hub: bool) -> None:
    """Raises WeightingError for what cannot be done: `unused` are arguments for searches, None or 0 where not given."""
    name, known = router_name(method), _options(method)
    if from_hub and not isinstance(method, str):
        raise WeightingError(
            f"a router {name!r} that was made already is for its own experts: pass the pool that it was made for, as in "
            "hub.pool(router.experts), and not a hub"
        )
    require_known(f"method {name!r}", options, known)
    if "steps" in options:
        require_whole(f"steps of method {name!r}", options["steps"], 1, WeightingError)
    for argument, value in unused.items():
        if value:
            raise WeightingError(
                f"{argument}={value!r} is for searches of weights, but {name!r} is a router, which weighs every token by "
                f"itself: leave {argument} out"
            )


def _options(method: str | Router) -> list[str]:
    """The options of a router of that name, and of its training; a router object has none."""
    found = _class_of(method)
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


def _class_of(name: str | Router) -> type[TokenRouter] | None:
    """The router's class that a name stands for; None for a search, for no name, and for a router that was made."""
    found = registry.get("routers", name) if isinstance(name, str) and name in registry.names("routers") else None
    return found if isinstance(found, type) and issubclass(found, TokenRouter) else None


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


def own_options(found: type[Solver]) -> dict[str, Any]:
    """{name: kind} of the options that a user may set, `start` among them where the solver has one."""
    return options_of(found, beside=(*_LIMITS, *SUPPLIED))


def takes(found: type[Solver], name: str) -> bool:
    """Whether the solver's __init__ has an argument of that name."""
    return name in options_of(found)


def check_options(method: str, options: Mapping[str, Any], seed: int, *, from_hub: bool) -> None:
    """Raises WeightingError or UnknownName for options that the method does not have and values that it cannot use."""
    require_known(f"method {method!r}", options, {} if method in OTHER_WAYS else own_options(solver_class(method)))
    if method not in OTHER_WAYS:
        # a start may have a name, whatever the solver takes
        solver_class(method).check({name: value for name, value in options.items() if name not in ("start", "groups")})
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
    """Makes a solver over two made-up experts, so that it checks its own options; those that name experts are left out."""
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
    """The solver with its limits. Of `supplied` it gets what it takes, unless the options give it."""
    arguments = {name: value for name, value in supplied.items() if takes(found, name)}
    arguments |= options
    limits = {"budget": budget, "seconds": seconds, "seed": seed}
    arguments |= {name: value for name, value in limits.items() if takes(found, name)}
    return found(experts, **arguments)
