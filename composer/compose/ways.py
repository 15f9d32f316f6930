"""The ways that compose() measures: always the plain ones, and the search that was asked for or those that race."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from loraweave.composer.compose.loss import ExampleLoss, Penalty, together, together_with_gradients
from loraweave.composer.compose.measurement import Choice, Measurement, Part, Trial, Way
from loraweave.composer.compose.race import RACERS, Entry, entries, planned, tuned_steps
from loraweave.composer.compose.refine import Tuning
from loraweave.composer.compose.settings import BEST, OTHER_WAYS, Settings, make_solver, solver_class
from loraweave.composer.compose.trained_ways import Routed, Training, Tuned
from loraweave.composer.compose.user_loss import UserLoss, make_objective
from loraweave.composer.composer import Composer
from loraweave.errors import SearchFailed, WeightingError
from loraweave.routers.searches._solver import Solver, described
from loraweave.routers.searches._told import SearchResult, Told
from loraweave.routers.searches.similarity import Similarity
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

Start = Mapping[str, float] | MixtureWeights | None


class Ways:
    """Makes the ways for one engine and one task. Making this measures every adapter alone, once the rest is in order."""

    def __init__(
        self,
        engine: Composer,
        tokenizer: Any,
        task: Task,
        settings: Settings,
        scores: Mapping[str, float],
        num_folds: int,
        on_progress: Callable[[int], object],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._task = task
        self._settings = settings
        self._scores = scores
        self._on_progress = on_progress
        self._names = engine.pool.names
        self._solvers: dict[str, Solver] = {}
        # why searches left the race
        self.left: list[str] = []
        self._routed = self._router() if settings.routes else None
        self._entries = [] if settings.routes else self._entered(num_folds)
        self._tuned_steps = self._steps_after(num_folds)
        # evaluations of the searches; a formula has none
        searched = [entry for entry in self._entries if self._solvers[entry.method].learns]
        self.planned = planned(searched, self._tuned_steps, num_folds)
        if self._routed is not None:
            self.planned = self._routed.planned(num_folds)
        # without examples there is nothing to compare on
        self.loss = ExampleLoss(engine, tokenizer, task, l1=0.0) if task.examples else None
        self._singles = None if self.loss is None else BestSingle(engine, self.loss)
        if self._singles is not None:
            on_progress(len(engine.pool))

    def plain(self) -> list[Way]:
        """The base model, the best single adapter, and the uniform mixture, in the way it was asked for if it was."""
        if self._singles is None:
            return []
        weights = dict.fromkeys(self._names, 1 / len(self._names))
        uniform = self.asked() if self._settings.method == "uniform" else self._fixed("uniform", weights)
        return [self._fixed("base", {}), self._singles, uniform]

    def asked(self) -> Way:
        """The method that was asked for."""
        if self._routed is not None:
            return self._routed
        (entry,) = self._entries
        solver = self._solvers[entry.method]
        if solver.learns:
            return self._searched(entry)
        (mixture,) = solver.ask()
        return Fixed(entry.method, self._engine, mixture, self._merge_method(entry))

    def race(self, measure: Measurement, plain: Sequence[Trial]) -> list[Trial]:
        """The plain trials, and those of the searches that race, of which only the best one is run on all examples.

        A search none of whose candidates can be scored leaves the race; `left` then says why.
        """
        run = measure.held_out if self._settings.folds else measure.trial
        raced = [trial for entry in self._entries if (trial := self._stays(run, self._searched(entry)))]
        if self._tuned_steps and raced and (trial := self._stays(run, self._tuned(raced[0], measure.folds))):
            raced.append(trial)
        while raced and not self._stays(measure.finished, best := min(raced, key=lambda trial: trial.held_out_loss)):
            raced.remove(best)
        return [*plain, *raced]

    def _stays(self, measured: Callable[[Any], Trial], racer: Way | Trial) -> Trial | None:
        try:
            return measured(racer)
        except SearchFailed as error:
            self.left.append(f"{racer.name} left the race: {error}")
            return None

    def _router(self) -> Routed:
        settings = self._settings
        training = Training.of(settings.options, settings.budget, settings.seed, settings.checkpoint)
        return Routed(settings.method, self._engine, self._task, training, settings.options, self._on_progress)

    def _entered(self, num_folds: int) -> list[Entry]:
        """The searches that will run. Raises what their settings raise, before the first forward pass."""
        settings = self._settings
        alone = len(self._names) == 1
        if alone and settings.learns and settings.method not in ("auto", "grid"):
            raise WeightingError(
                f"method {settings.name!r} weighs adapters against each other, but there is only {self._names[0]!r}: "
                "take it as it is (method='best_single'), let method='grid' find its strength, or give more adapters"
            )
        if settings.method == "auto":
            # of one adapter there is only with and without
            racers = [] if alone else [method for method in RACERS if settings.can_run(method)]
            entered = entries(racers, settings.budget, settings.seconds, num_folds)
        elif settings.method in OTHER_WAYS:
            return []
        else:
            entered = [Entry(settings.name, settings.budget, settings.seconds, settings.options)]
        for entry in entered:
            self._solvers[entry.method] = self._solver(entry, _given_start(entry))
            self._require_one_merge(entry)
        return entered

    def _require_one_merge(self, entry: Entry) -> None:
        groups, merge_method = self._solvers[entry.method].space.groups, self._merge_method(entry)
        if groups and merge_method != "linear":
            raise WeightingError(
                f"method {entry.method!r} is to weigh {len(groups)} groups of layers apart, but what its weights mean is "
                f"{merge_method!r}, which takes one weight for each adapter: leave out groups=, or pass space='deltas'"
            )

    def _steps_after(self, num_folds: int) -> int:
        """The steps of training that race too; none where an adapter is more than factors of linear layers."""
        settings, adapters = self._settings, self._engine.bound_pool.adapters.values()
        if settings.method != "auto" or settings.merge_method not in (None, "linear"):
            return 0
        plain = all(
            factors.kind == "linear" and factors.gain_O is None and factors.bias_O is None
            for adapter in adapters
            for factors in adapter.layers.values()
        )
        return tuned_steps(self._entries, settings.budget, num_folds) if plain else 0

    def _tuned(self, first: Trial, folds: Sequence[Part]) -> Tuned:
        tuning = Tuning(self._tuned_steps, seed=self._settings.seed)
        kept = self._settings.checkpoint
        way = Tuned(first.way, self._tokenizer, self._task, tuning, checkpoint=kept, on_progress=self._on_progress)
        way.known(folds, first.fold_choices)
        return way

    def _searched(self, entry: Entry) -> Searched:
        inputs = self._inputs(entry)
        return Searched(
            entry.method,
            lambda part: self._solver(entry, self._start(entry, part)),
            self._objective(entry, inputs),
            checkpoint=self._settings.checkpoint,
            on_progress=self._on_progress,
            num_inputs=None if inputs is None else len(inputs),
        )

    def _start(self, entry: Entry, part: Part) -> Start:
        """Where a search of a part's examples begins; None for the solver's own default."""
        given: Start | str = entry.options.get("start", solver_class(entry.method).begins(entry.options))
        if not isinstance(given, str):
            return given
        if given == "uniform":
            return dict.fromkeys(self._names, 1 / len(self._names))
        if given == "retrieval":
            return Similarity(self._names, scores=self._scores).ask()[0]
        if given == "base":
            return {}
        assert self._singles is not None
        return self._singles.best(part.seen, BEST[given])

    def _inputs(self, entry: Entry) -> Sequence[str] | None:
        """The inputs of an objective that looks at no targets; by default those of the examples."""
        if (self._settings.objective or self._solvers[entry.method].loss) != "entropy":
            return None
        given = self._settings.inputs
        return [text for text, _ in self._task.examples] if given is None else given

    def _solver(self, entry: Entry, start: Start) -> Solver:
        settings = self._settings
        return make_solver(
            solver_class(entry.method),
            self._names,
            budget=entry.budget,
            seconds=entry.seconds,
            seed=settings.seed,
            supplied={
                "scores": self._scores,
                "layers": list(self._engine.target_layers),
                "weights": settings.weights,
                "start": start,
            },
            options={name: value for name, value in entry.options.items() if name != "start"},
        )

    def _objective(self, entry: Entry, inputs: Sequence[str] | None) -> ExampleLoss | UserLoss:
        settings, solver = self._settings, self._solvers[entry.method]
        loss, merge_method = settings.objective or solver.loss, self._merge_method(entry)
        l1 = solver.l1 if settings.l1 is None else settings.l1
        if loss == "cross_entropy" and merge_method == "linear" and self.loss is not None:
            return self.loss.penalised(Penalty(l1, settings.l2, settings.sparsity))
        return make_objective(
            self._engine,
            self._tokenizer,
            self._task,
            loss,
            merge_method=merge_method,
            l1=l1,
            l2=settings.l2,
            sparsity=settings.sparsity,
            inputs=inputs,
        )

    def _merge_method(self, entry: Entry) -> str:
        return self._settings.merge_method or self._solvers[entry.method].merge_method

    def _fixed(self, name: str, weights: Mapping[str, float]) -> Fixed:
        return Fixed(name, self._engine, MixtureWeights.of(weights, self._names))


def _given_start(entry: Entry) -> Start:
    """The start that was given as weights, to be looked over."""
    given = entry.options.get("start")
    return None if isinstance(given, str) else given


class Fixed:
    """A mixture that no example had a part in choosing."""

    learns = False

    def __init__(self, name: str, engine: Composer, mixture: MixtureWeights, merge_method: str = "linear") -> None:
        self.name = name
        self.evaluations = 1
        self._choice = Choice(engine, mixture, merge_method)

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        return [self._choice] * len(parts)


class BestSingle:
    """The adapter of the lowest mean loss on the examples seen, with weight 1; the earlier one when equal.

    All adapters are measured once, on all examples, when this is made.
    """

    name = "best_single"
    learns = True

    def __init__(self, engine: Composer, loss: ExampleLoss) -> None:
        self._engine = engine
        self._names = engine.pool.names
        self._losses_EN, self._hits_EN = loss.scores([MixtureWeights.of({name: 1.0}, self._names) for name in self._names])
        self.evaluations = len(self._names)

    def best(self, examples: Sequence[int], count: int) -> dict[str, float]:
        """1/count each for the adapters of the lowest losses on these examples; for all where there are fewer."""
        means_E = self._losses_EN[:, list(examples)].mean(axis=1)
        # stable, and NaN is last: of equal ones the earlier
        order = np.argsort(means_E, kind="stable")[:count]
        return {self._names[place]: 1 / len(order) for place in order}

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        return [self._choice(next(iter(self.best(part.seen, 1)))) for part in parts]

    def _choice(self, name: str) -> Choice:
        alone, place = MixtureWeights.of({name: 1.0}, self._names), self._names.index(name)
        return Choice(self._engine, alone, known=(self._losses_EN[place], self._hits_EN[place]))


class Searched:
    """The best candidate of a solver, which sees a part's examples only; `checkpoint` is a folder with a file for each.

    With `num_inputs`, the objective is of so many inputs without targets: a search sees all of them, whatever the part.
    """

    def __init__(
        self,
        name: str,
        solver: Callable[[Part], Solver],
        objective: ExampleLoss | UserLoss,
        *,
        checkpoint: Path | None,
        on_progress: Callable[[int], object],
        num_inputs: int | None = None,
    ) -> None:
        self.name = name
        # without targets there is nothing to hold out
        self.learns = num_inputs is None
        self.evaluations = 0
        self._solver = solver
        self._objective = objective
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._num_inputs = num_inputs

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        searches = [self._search(part) for part in parts]
        while running := [(search, asked) for search in searches if (asked := search.solver.ask())]:
            objectives, candidates = [search.objective for search, _ in running], [asked for _, asked in running]
            if searches[0].solver.needs_gradients:
                told = together_with_gradients(objectives, candidates)
            else:
                told = [(losses, []) for losses in together(objectives, candidates)]
            for (search, asked), (losses, gradients) in zip(running, told, strict=True):
                search.tell(losses, gradients)
                made = search.solver.cost * len(asked)
                self.evaluations += made
                self._on_progress(made)
        return [self._choice(search) for search in searches]

    def _search(self, part: Part) -> _Search:
        log = None if self._checkpoint is None else self._checkpoint / f"{self.name}-{part.name}.json"
        seen = part.seen if self._num_inputs is None else range(self._num_inputs)
        search = _Search(self._solver(part), self._objective.view(seen), log)
        self.evaluations += search.solver.spent
        self._on_progress(search.solver.spent)
        return search

    def _choice(self, search: _Search) -> Choice:
        result = search.result()
        return Choice(
            self._objective.engine,
            result.mixture,
            self._objective.merge_method,
            result.num_trained,
            result.failed,
            result.losses,
        )


class _Search:
    """A solver with its objective, resumed from its checkpoint if there is one."""

    def __init__(self, solver: Solver, objective: ExampleLoss | UserLoss, log: Path | None) -> None:
        self.solver = solver
        self.objective = objective
        self._log = log
        self._kept = {} if log is None else {**solver.settings(), **described(objective)}
        if log is not None:
            solver.replay(Told.read(log, self._kept))

    def tell(self, losses: Sequence[float], gradients: Sequence[Tensor]) -> None:
        """Also writes the checkpoint. SearchFailed, with why the first candidate could not be scored, when none can be."""
        try:
            self.solver.tell(losses, gradients)
        except SearchFailed as error:
            raise self._explained(error) from error
        if self._log is not None:
            self.solver.keep(self._log, self._kept)

    def result(self) -> SearchResult:
        """The best candidate; SearchFailed as above."""
        try:
            return self.solver.result()
        except SearchFailed as error:
            raise self._explained(error) from error

    def _explained(self, error: SearchFailed) -> SearchFailed:
        return SearchFailed(f"{error}. The first failed with {self.objective.failures.first}")
