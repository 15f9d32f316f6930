"""The ways that compose() measures: always the plain ones, and the search that was asked for or those that race."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.composing.choice import Way
from loraweave.composer.composing.measurement import Measurement, Trial
from loraweave.composer.composing.parts import Part
from loraweave.composer.composing.searched import Searched
from loraweave.composer.composing.settings import Settings
from loraweave.composer.composing.simple_ways import BestSingle, Fixed
from loraweave.composer.composing.solver_options import OTHER_WAYS, make_solver, solver_class
from loraweave.composer.example_loss import ExampleLoss
from loraweave.composer.make_objective import make_objective
from loraweave.composer.user_loss import UserLoss
from loraweave.errors import UnknownName
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.search.solver import Solver
from loraweave.types import Task


@dataclass(frozen=True)
class Entry:
    """A search that is run: a solver, its options, and its share of the budget."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


Start = Mapping[str, float] | MixtureWeights | None
# where a search can begin, by name: how many of the best adapters share the weight 1; none, and all alike
STARTS = {"best_single": 1, "best_three": 3, "base": 0, "uniform": 0}

# what method="auto" races
RACE = (Entry("lorahub", "lorahub"),)


class Ways:
    """Makes the ways for one engine and one task. Making this measures every adapter alone, once the rest is in order."""

    def __init__(
        self,
        engine: Composer,
        tokenizer: Any,
        task: Task,
        settings: Settings,
        scores: Mapping[str, float],
        on_progress: Callable[[int], object],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._task = task
        self._settings = settings
        self._scores = scores
        self._on_progress = on_progress
        self._names = engine.pool.names
        if settings.method == "auto":
            self._entries: tuple[Entry, ...] = RACE
        elif settings.method in OTHER_WAYS:
            self._entries = ()
        else:
            self._entries = (Entry(settings.method, settings.method, settings.options),)
        for entry in self._entries:
            _check_start(entry)
        self._solvers = {entry.name: self._solver(entry, _given_start(entry)) for entry in self._entries}
        self._singles = BestSingle(engine, ExampleLoss(engine, tokenizer, task, l1=0.0))
        on_progress(len(engine.pool))

    def plain(self) -> list[Way]:
        """The base model, the best single adapter, and the uniform mixture."""
        uniform = dict.fromkeys(self._names, 1 / len(self._names))
        return [self._fixed("base", {}), self._singles, self._fixed("uniform", uniform)]

    def asked(self) -> Way:
        """The method that was asked for."""
        (entry,) = self._entries
        solver = self._solvers[entry.name]
        if solver.learns:
            return self._searched(entry)
        (mixture,) = solver.ask()
        return Fixed(entry.name, self._engine, mixture, self._merge_method(entry))

    def race(self, measure: Measurement, plain: Sequence[Trial]) -> list[Trial]:
        """The plain trials, and those of the searches that race, of which only the best one is run on all examples."""
        raced = [measure.held_out(self._searched(entry)) for entry in self._entries]
        measure.finished(min(raced, key=lambda trial: trial.held_out_loss))
        return [*plain, *raced]

    def _searched(self, entry: Entry) -> Searched:
        return Searched(
            entry.name,
            lambda part: self._solver(entry, self._start(entry, part)),
            self._objective(entry),
            checkpoint=self._settings.checkpoint,
            on_progress=self._on_progress,
            num_inputs=None if self._inputs(entry) is None else len(self._inputs(entry) or ()),
        )

    def _start(self, entry: Entry, part: Part) -> Start:
        """Where a search of a part's examples begins; None for the solver's own default."""
        given: Start | str = entry.options.get("start", solver_class(entry.method).begins(entry.options))
        if not isinstance(given, str):
            return given
        if given == "uniform":
            return dict.fromkeys(self._names, 1 / len(self._names))
        return {} if given == "base" else self._singles.best(part.seen, STARTS[given])

    def _inputs(self, entry: Entry) -> Sequence[str] | None:
        """The inputs of an objective that looks at no targets; by default those of the examples."""
        if (self._settings.objective or self._solvers[entry.name].loss) != "entropy":
            return None
        given = self._settings.inputs
        return [text for text, _ in self._task.examples] if given is None else given

    def _solver(self, entry: Entry, start: Start) -> Solver:
        settings = self._settings
        return make_solver(
            solver_class(entry.method),
            self._names,
            budget=None if settings.budget is None else int(settings.budget * entry.share),
            seconds=None if settings.seconds is None else settings.seconds * entry.share,
            seed=settings.seed,
            supplied={
                "scores": self._scores,
                "layers": list(self._engine.target_layers),
                "weights": settings.weights,
                "start": start,
            },
            options={name: value for name, value in entry.options.items() if name != "start"},
        )

    def _objective(self, entry: Entry) -> ExampleLoss | UserLoss:
        settings, solver = self._settings, self._solvers[entry.name]
        return make_objective(
            self._engine,
            self._tokenizer,
            self._task,
            settings.objective or solver.loss,
            merge_method=self._merge_method(entry),
            l1=solver.l1 if settings.l1 is None else settings.l1,
            l2=settings.l2,
            sparsity=settings.sparsity,
            inputs=self._inputs(entry),
        )

    def _merge_method(self, entry: Entry) -> str:
        return self._settings.merge_method or self._solvers[entry.name].merge_method

    def _fixed(self, name: str, weights: Mapping[str, float]) -> Fixed:
        return Fixed(name, self._engine, MixtureWeights.of(weights, self._names))


def _given_start(entry: Entry) -> Start:
    """The start that was given as weights, to be looked over."""
    given = entry.options.get("start")
    return None if isinstance(given, str) else given


def _check_start(entry: Entry) -> None:
    given = entry.options.get("start")
    if isinstance(given, str) and given not in STARTS:
        close = difflib.get_close_matches(given, STARTS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise UnknownName(f"no start {given!r} of a search{hint}; there are {', '.join(STARTS)}, or give weights")
