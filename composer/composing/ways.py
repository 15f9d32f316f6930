"""The ways that compose() measures: always the plain ones, and the search that was asked for or those that race."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.composing.choice import Way
from loraweave.composer.composing.measurement import Measurement, Trial
from loraweave.composer.composing.searched import Searched
from loraweave.composer.composing.settings import Settings
from loraweave.composer.composing.simple_ways import BestSingle, Fixed
from loraweave.composer.composing.solver_options import OTHER_WAYS, make_solver, solver_class
from loraweave.composer.example_loss import ExampleLoss
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
        self._solvers = {entry.name: self._solver(entry, {}) for entry in self._entries}
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
            lambda part: self._solver(entry, self._singles.weights(part.seen)),
            self._objective(entry),
            checkpoint=self._settings.checkpoint,
            on_progress=self._on_progress,
        )

    def _solver(self, entry: Entry, start: Mapping[str, float]) -> Solver:
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
            options=entry.options,
        )

    def _objective(self, entry: Entry) -> ExampleLoss:
        settings, solver = self._settings, self._solvers[entry.name]
        return ExampleLoss(
            self._engine,
            self._tokenizer,
            self._task,
            kind=settings.objective or solver.loss,
            merge_method=self._merge_method(entry),
            l1=solver.l1 if settings.l1 is None else settings.l1,
            l2=settings.l2,
            sparsity=settings.sparsity,
        )

    def _merge_method(self, entry: Entry) -> str:
        return self._settings.merge_method or self._solvers[entry.name].merge_method

    def _fixed(self, name: str, weights: Mapping[str, float]) -> Fixed:
        return Fixed(name, self._engine, MixtureWeights.of(weights, self._names))
