"""The arguments of compose(), checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import loraweave.registry as registry
from loraweave.common.chat import Prompt
from loraweave.common.checks import require_whole, says_something
from loraweave.common.files import as_path
from loraweave.common.options import Count, NonNegative, Positive, Range, Seed, check_options, options_of, require_known
from loraweave.common.rows import GivenRows, read_asked
from loraweave.composer.compose.examples import Examples
from loraweave.errors import InvalidTask, LoraweaveError, ScopeError, UnknownName, WeightingError
from loraweave.hub.adapter import shared_invocation
from loraweave.hub.hub import Hub
from loraweave.hub.licenses import require_one_work, stated_license
from loraweave.hub.pool import ExpertPool
from loraweave.registry import get, nearest
from loraweave.routers.searches._solver import Solver, require_one_clock
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._router import TokenRouter, option_names
from loraweave.routers.weights import MixtureWeights, Router
from loraweave.types import Task

# the merge method whose weights a search looks for, by the name of the space
SPACES = {"deltas": "linear", "factors": "factor_sum"}
# the default numbers of folds: "auto" averages several ways, which needs no guard
FOLDS, FOLDS_OF_AUTO = 3, 0
# from this number of examples on, "auto" compares its ways, with a long training, on a fifth of the examples
MANY = 50
# the most inputs without targets that calibrate labels, or that find adapters for a task without examples
CALIBRATING = 20
# the methods of compose() that are no solvers
OTHER_WAYS = ("auto", "base", "best_single", "in_context", "few_shot")
# the options that compose() itself passes to a solver that takes them
SUPPLIED = tuple(registry.RESERVED["routers"])
LIMITS = ("budget", "seconds", "seed")
# the number of best adapters that share the weight 1, by the name of the start; then the names of all starts
BEST = {"best_single": 1, "best_three": 3}
STARTS = (*BEST, "base", "uniform", "retrieval")
# a budget that suits any options
PLENTY = 10**9
# arguments that mean nothing to a router
FOR_SEARCHES = ("seconds", "space", "merge_method", "objective", "inputs", "l1", "l2", "sparsity")
# arguments that compose() adds to the options of a router that is trained
TRAINING = ("steps", "lr")
FEW_SHOT_OPTIONS = {"steps": Count, "lr": Positive}


Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Settings:
    """The arguments of compose() that say how to search."""

    method: str | Router
    k: Count
    budget: Count | None
    seconds: Positive | None
    seed: Seed
    folds: Annotated[int, Range(least=0)]
    space: str | None
    weights: Mapping[str, float] | None
    objective: str | Callable[[Any, Examples], float] | None
    inputs: Sequence[Prompt] | None
    l1: NonNegative | None
    l2: NonNegative
    sparsity: NonNegative
    checkpoint: Path | None
    merge_method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_licenses: bool = False

    @classmethod
    def of(cls, *, folds: int | None, checkpoint: str | Path | None, inputs: GivenRows | None, **arguments: Any) -> Settings:
        """Return the settings. Raises WeightingError if `checkpoint` is not a path, InvalidTask for unreadable inputs."""
        if folds is None:
            folds = FOLDS_OF_AUTO if arguments["method"] == "auto" else FOLDS
        texts = None if inputs is None else read_asked(inputs)
        folder = None if checkpoint is None else as_path(checkpoint, "checkpoint", WeightingError)
        return cls(folds=folds, checkpoint=folder, inputs=texts, **arguments)

    @property
    def name(self) -> str:
        """The method's name."""
        return router_name(self.method)

    @property
    def routes(self) -> bool:
        """True if a router makes the weights, not a search."""
        return routes(self.method)

    @property
    def learns(self) -> bool:
        """True if the weights depend on the examples, so that some examples must be held out to judge them."""
        if self.routes:
            # a router object is used as it is
            return _class_of(self.method, LearnedRouter) is not None
        return self.method in ("auto", "few_shot") if self.method in OTHER_WAYS else solver_class(self.name).learns

    def has_many(self, task: Task) -> bool:
        """Return True if method "auto" has enough examples to hold a fifth of them out, and to train for long."""
        return self.method == "auto" and not self.folds and len(task.examples) >= MANY

    @property
    def asks_the_task(self) -> bool:
        """True if the search minimises the task's own loss, and its weights mean a sum of updates."""
        return self.objective in (None, "cross_entropy") and self.meaning in (None, "linear")

    @property
    def meaning(self) -> str | None:
        """The merge method whose weights the search looks for; None for the search's own default."""
        return self.merge_method if self.space is None else SPACES[self.space]

    def start_name(self, solver_type: type[Solver]) -> str | None:
        """Return the name of the search's start; None for a start given as weights, and for the solver's default start."""
        start = self.options.get("start", solver_type.begins(self.options))
        return start if isinstance(start, str) else None

    def can_run(self, method: str) -> bool:
        """Return True if the search of that name needs no gradients, or the objective has them."""
        if not solver_class(method).needs_gradients:
            return True
        smooth = not callable(self.objective) and self.objective != "exact_match"
        return smooth and self.meaning in (None, "linear")

    def solver(self, experts: Sequence[str], supplied: Mapping[str, Any]) -> Solver:
        """Return the method's solver with its limits and options; options that are in `supplied` are taken from it."""
        solver_type = solver_class(self.name)
        arguments = {**supplied, "budget": self.budget, "seconds": self.seconds, "seed": self.seed}
        known = options_of(solver_type)
        return solver_type(experts, **{**self.options, **{name: arguments[name] for name in arguments if name in known}})

    def require_combinable(self, pool: ExpertPool) -> None:
        """Raise InvalidLicense if the composition would combine adapters whose licenses exclude each other.

        Raises CompositionError if it would combine adapters that act from different invocation tokens on. A single adapter,
        the base, and mixtures that a router makes live combine nothing.
        """
        weights = {name: weight for name, weight in (self.weights or dict.fromkeys(pool.names)).items() if weight != 0.0}
        alone = self.method in ("base", "best_single", "in_context", "few_shot") or list(weights.values()) == [1.0]
        if alone or self.routes:
            return
        shared_invocation([pool[name] for name in weights])
        if not self.allow_licenses:
            require_one_work([(name, stated_license(pool[name].card.get("license"))) for name in weights])

    def check(self, task: Task, experts: Hub | ExpertPool) -> None:
        """Raise UnknownName, WeightingError or InvalidTask for arguments that cannot work, without looking at a model."""
        from_hub = isinstance(experts, Hub)
        if not isinstance(task, Task):
            raise InvalidTask(f"the task is {task!r:.80}; give lw.Task([(input, target), ...], instruction=...)")
        check_options("compose()", vars(self), options_of(Settings), noun="argument")
        if self.checkpoint is not None and self.checkpoint.is_file():
            raise WeightingError(f"checkpoint is {str(self.checkpoint)!r}, which is a file; name a folder")
        if self.routes:
            self._check_router(from_hub)
        else:
            self._check_search(from_hub)
        if (self.method == "manual") != (self.weights is not None):
            raise WeightingError("method 'manual' takes weights={name: weight}, and no other method does")
        self._check_objective(task)
        self._check_examples(task, from_hub)

    def _check_router(self, from_hub: bool) -> None:
        if from_hub and not isinstance(self.method, str):
            raise WeightingError(
                f"a router {self.name!r} that was made already is for its own experts: pass the pool that it was made for, "
                "as in hub.pool(router.experts), and not a hub"
            )
        require_known(f"method {self.name!r}", self.options, _options(self.method))
        if "steps" in self.options:
            require_whole(f"steps of method {self.name!r}", self.options["steps"], 1, WeightingError)
        for argument in FOR_SEARCHES:
            if value := getattr(self, argument):
                raise WeightingError(
                    f"{argument}={value!r} is for searches of weights, but {self.name!r} is a router, which weighs every "
                    f"token by itself: leave {argument} out"
                )

    def _check_search(self, from_hub: bool) -> None:
        solver_type = None if self.method in OTHER_WAYS else solver_class(self.name)
        if solver_type is not None and "scores" in options_of(solver_type) and not from_hub:
            raise WeightingError(f"method {self.method!r} weighs by retrieval scores, so it needs a hub, not a pool")
        if self.space is not None and self.space not in SPACES:
            hint = nearest(self.space, SPACES)
            raise UnknownName(f"no space {self.space!r} to compose with{hint}; there are {', '.join(SPACES)}")
        if self.merge_method is not None:
            self._check_merge_method()
        if self.budget is None and self.seconds is None and (solver_type is not None or self.method == "auto"):
            raise WeightingError("a search needs a budget of evaluations, or of seconds, or both")
        require_one_clock(self.seconds)
        self._check_options(solver_type, from_hub)
        if solver_type is not None and not self.can_run(self.name):
            objective_name = "a function" if callable(self.objective) else repr(self.objective or "cross_entropy")
            where = "" if self.space is None else f" in space {self.space!r}"
            where = where if self.merge_method is None else f" through merge method {self.merge_method!r}"
            raise WeightingError(
                f"method {self.name!r} follows gradients, but there are no gradients of {objective_name}{where}: "
                "take 'cross_entropy', 'labels' or 'entropy' in space 'deltas', or a method that needs none, as 'lorahub'"
            )

    def _check_merge_method(self) -> None:
        if self.space is not None:
            raise WeightingError(
                f"space={self.space!r} and merge_method={self.merge_method!r} both say what weights mean; leave one out"
            )
        # imported here, since few searches need merging
        from loraweave.composer.merge.method_call import MethodCall

        if "statistics" in MethodCall(self.merge_method or "").parameters:
            raise WeightingError(
                f"merge method {self.merge_method!r} weighs by statistics of each adapter, which a search has none of: "
                "lw.merge(statistics=...) takes them"
            )

    def _check_options(self, solver_type: type[Solver] | None, from_hub: bool) -> None:
        if self.method == "few_shot":
            check_options(f"method {self.name!r}", self.options, FEW_SHOT_OPTIONS)
            return
        known = {} if solver_type is None else options_of(solver_type, beside=("experts", *LIMITS, *SUPPLIED))
        require_known(f"method {self.name!r}", self.options, known)
        if solver_type is not None:
            # a start may be a name, whatever the solver itself takes as its start
            solver_type.check({name: value for name, value in self.options.items() if name != "start"})
            self._check_start(solver_type, from_hub)
            if solver_type.learns:
                self._try_options()

    def _check_start(self, solver_type: type[Solver], from_hub: bool) -> None:
        start, name = self.options.get("start"), self.start_name(solver_type)
        if name is not None and name not in STARTS:
            hint = nearest(name, STARTS)
            raise UnknownName(f"no start {name!r} of a search{hint}; there are {', '.join(STARTS)}, or give weights")
        if name == "retrieval" and not from_hub:
            raise WeightingError("start='retrieval' takes the softmax of retrieval scores, so it needs a hub, not a pool")
        if name is None and not isinstance(start, Mapping | MixtureWeights | None):
            raise WeightingError(f"start is {start!r:.80}; give {{name: weight}}, or one of {', '.join(STARTS)}")

    def _try_options(self) -> None:
        """Make a solver over two made-up experts, so that it checks its options; those that name experts are left out."""
        options = {name: value for name, value in self.options.items() if name not in ("start", "groups")}
        try:
            replace(self, budget=PLENTY, seconds=None, options=options).solver(("a", "b"), {"layers": ["layer"]})
        except LoraweaveError:
            raise
        except (TypeError, ValueError) as error:
            options_text = ", ".join(f"{name}={value!r:.40}" for name, value in options.items())
            raise WeightingError(
                f"the options of method {self.name!r} are {options_text}, and cannot be used: {error}"
            ) from error

    def _check_objective(self, task: Task) -> None:
        if not (isinstance(self.objective, str | None) or callable(self.objective)):
            raise WeightingError(
                f"objective is {self.objective!r}; give the name of one, or a function of (model, examples)"
            )
        loss = None
        if self.learns and not self.routes:
            loss = self.objective or ("cross_entropy" if self.method in OTHER_WAYS else solver_class(self.name).loss)
        of_auto = self.method == "auto" and (task.labels or not task.examples)
        if self.inputs is not None and loss != "entropy" and not of_auto:
            objective_name = "a function" if callable(loss) else repr(loss)
            raise InvalidTask(
                "inputs without targets are for objective 'entropy', and for method 'auto' of a task with labels, but "
                f"method {self.name!r} has {objective_name}: pass objective='entropy', or leave inputs out"
            )
        if self.inputs is not None and not self.inputs:
            raise InvalidTask("inputs are []; give at least one text")
        # an objective given to a method that does not search must have a known name too
        if (name := loss if self.objective is None else self.objective) is not None and not callable(name):
            kind = get("objectives", name)
            if loss is not None and (loss != "entropy" or self.inputs is None):
                # the kind itself refuses tasks that it cannot score
                kind(task)

    def _check_examples(self, task: Task, from_hub: bool) -> None:
        """Raise an error for missing examples: only "auto" with an instruction, and a search by entropy, run without any."""
        if task.examples:
            if self.learns and self.folds and len(task.examples) < 2:
                raise InvalidTask("one example cannot be both searched on and held out: give two or more, or pass folds=0")
            if self.learns and self.folds == 1:
                raise WeightingError("folds is 1, which would hold out every example; pass 2 or more, or 0 for none")
            return
        if self.method == "auto" and from_hub and says_something(task.instruction):
            return
        if self.inputs is None or self.method == "auto":
            raise InvalidTask(
                "the task has no examples; give at least two (input, target) pairs, or inputs=[...] and objective='entropy' "
                "to a search; of a hub, and with an instruction, method 'auto' needs neither"
            )
        if (start := self.start_name(solver_class(self.name))) in BEST:
            raise WeightingError(
                f"start {start!r} is found on examples, and the task has none: give start='uniform', or weights as the start"
            )


def router_name(router: str | Router) -> str:
    """Return the router's name in the registry, or its class's name if it has none; return a name unchanged."""
    match router:
        case str():
            return router
        case TokenRouter():
            return router.name
    return type(router).__name__


def require_no_router(router: Router | None, verb: str) -> None:
    """Raise ScopeError if there is a router: its weights depend on the input, and the action `verb` needs fixed weights."""
    if router is not None:
        raise ScopeError(
            f"a composition by router {router_name(router)!r} cannot {verb}: its weights depend on the input. It answers "
            "live, save_pretrained() keeps router and adapters, and engine.activate(composition.weights) does the same "
            "elsewhere; for weights that can be merged, compose() with a search"
        )


def routes(method: str | Router) -> bool:
    """Return True for a router or a router's name. Raises WeightingError for anything but a name or a router object."""
    if isinstance(method, str):
        return _class_of(method, TokenRouter) is not None
    if isinstance(method, MixtureWeights) or not callable(getattr(method, "weights", None)):
        raise WeightingError(
            f"method is {method!r}; give the name of a search or a router, or a router object. Known weights "
            "go to method='manual' as weights={name: weight}"
        )
    return True


def _options(method: str | Router) -> list[str]:
    """Return the names of the options of a named router, and of its training; [] for a router object."""
    router_type, learned = _class_of(method, TokenRouter), _class_of(method, LearnedRouter)
    if router_type is None or learned is None:
        return [] if router_type is None else option_names(router_type)
    if learned.needs_experts:
        raise WeightingError(
            f"router {method!r} learns from rows that name their expert, and a task's examples name none: fit() one on the "
            "experts' own data, and pass it as method=router"
        )
    return [*option_names(router_type), *TRAINING]


def _class_of(name: str | Router, kind: type[Kind]) -> type[Kind] | None:
    """Return the registered class of that name if it is a `kind`; else None, also for unknown names and router objects."""
    if not isinstance(name, str) or name in OTHER_WAYS:
        return None
    try:
        registered = get("routers", name)
    except UnknownName:
        return None
    return registered if isinstance(registered, type) and issubclass(registered, kind) else None


def method_names() -> list[str]:
    """Return the names of the methods of compose(), sorted."""
    return sorted((*OTHER_WAYS, *registry.names("routers")))


def solver_class(method: str) -> type[Solver]:
    """Return the class of a search by its name. Raises UnknownName, with near misses, for what compose() cannot use."""
    solver_type: type[Solver] | None = _class_of(method, Solver)  # type: ignore[type-abstract]
    if solver_type is not None:
        return solver_type
    known = method_names()
    if method not in known:
        hint = nearest(method, known, "routers")
        raise UnknownName(f"no method {method!r} to compose with{hint}; there are {', '.join(known)}")
    raise UnknownName(f"router {method!r} does not search for weights: activate() it instead of composing with it")
