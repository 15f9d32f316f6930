"""A trial: one way to answer a task, and what it comes to on the task's examples.

Every trial is run the same way. It chooses once for each fold of a cross-validation, without the fold's held-out examples,
on which the choice is then measured; and it chooses once more on all examples, which is what a composition takes. The base
model and the uniform mixture choose the same whatever they see.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress

from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.report import Report, ReportRow
from loraweave.composer.compose.settings import Settings
from loraweave.composer.composer import Composer
from loraweave.composer.train.rows import MAX_PACKED
from loraweave.hub.adapter import Adapter
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.searches._told import SearchResult
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

if TYPE_CHECKING:
    from loraweave.composer.compose.scoring_workers import ScoringWorkers

# (loss_N, hit_N) on some examples, without terms for the weights
Scores = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Split:
    """The indices of the examples that a choice sees, and of those it is measured on afterwards."""

    name: str
    seen: tuple[int, ...]
    held: tuple[int, ...] = ()


def splits_of(task: Task, settings: Settings) -> list[Split]:
    """Return the splits that hold examples out: a fifth of many, or the folds of a way that learns, drawn by the seed."""
    num_examples = len(task.examples)
    if settings.has_many(task):
        return _folds(num_examples, 5, settings.seed)[:1]
    return _folds(num_examples, settings.folds, settings.seed) if settings.learns and num_examples else []


def _folds(num_examples: int, count: int, seed: int) -> list[Split]:
    """Return at most `count` splits whose held-out examples cover all, in an order that depends on the seed alone."""
    count = min(count, num_examples)
    order = np.random.default_rng(seed).permutation(num_examples).tolist()
    held_out = [tuple(sorted(order[start::count])) for start in range(count)]
    return [
        Split(f"fold-{number}", tuple(index for index in range(num_examples) if index not in held), held)
        for number, held in enumerate(held_out)
    ]


@dataclass(frozen=True, eq=False)
class Bench:
    """The things that all trials of a task share: examples are tokenised, and adapters measured alone, on the first demand.

    `scores` are those of retrieval. `on_progress` is called with the evaluations just made; with `progress` a training shows
    a bar of its own. A training under demonstrations begins as `start`, or as a new adapter; programs are of the
    `retriever`'s hub. With `turned`, examples that the prompts show are measured as `in_turn` says. The `workers` take the
    forward passes of a generation of candidates, of all splits together.
    """

    engine: Composer
    tokenizer: Any
    task: Task
    scores: Mapping[str, float]
    checkpoint: Path | None
    on_progress: Callable[[int], object]
    progress: bool | Progress = False
    start: Adapter | None = None
    retriever: Retriever | None = None
    turned: bool = False
    workers: ScoringWorkers | None = None
    _losses: dict[str, ExampleLoss] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return self.engine.pool.names

    def with_demonstrations(self, orders: int = 1) -> Bench:
        """Return a bench where every prompt shows the first other examples, unless the task shows some already."""
        if self.task.demonstrations:
            return self
        shown = self.task.examples[:MAX_PACKED]
        return replace(self, task=replace(self.task, demonstrations=shown, orders=orders), turned=True, _losses={})

    @property
    def everything(self) -> Split:
        """The split of all examples, with none held out."""
        return Split("all", tuple(range(len(self.task.examples))))

    def loss(self, merge_method: str = "linear") -> ExampleLoss:
        """Return the loss on all examples, without terms for the weights."""
        if merge_method not in self._losses:
            settings: dict[str, Any] = {"merge_method": merge_method, "turned": self.turned, "workers": self.workers}
            self._losses[merge_method] = ExampleLoss(self.engine, self.tokenizer, self.task, **settings, l1=0.0)
        return self._losses[merge_method]

    @cached_property
    def alone(self) -> Scores:
        """The (loss_EN, hit_EN) of each adapter with weight 1, on all examples."""
        measured = self.loss().scores([MixtureWeights.of({name: 1.0}, self.names) for name in self.names])
        self.on_progress(len(self.names))
        return measured

    def best(self, examples: Sequence[int], count: int) -> dict[str, float]:
        """Return {name: 1/count} of the adapters of the lowest mean losses on these examples; of all if there are fewer."""
        means_E = self.alone[0][:, list(examples)].mean(axis=1)
        # stable, and NaN is last: of equal ones the earlier
        order = np.argsort(means_E, kind="stable")[:count]
        return {self.names[place]: 1 / len(order) for place in order}

    def mixed(self, result: SearchResult, merge_method: str = "linear") -> Selection:
        """Return the choice of a search's mixture; the weights mean those of a merge method."""
        return self.selection(
            # a task without examples has no loss
            lambda examples: self.loss(merge_method).scores_on(result.mixture, examples),
            result,
            merge_method=merge_method,
        )

    def selection(
        self, scores: Callable[[Sequence[int]], Scores], result: SearchResult | None = None, **fields: Any
    ) -> Selection:
        """Return a choice with these fields of a composition; without a result, no adapter of the pool has a weight."""
        known = {"model": self.engine.model, "tokenizer": self.tokenizer, "task": self.task, "pool": self.engine.pool}
        if result is None:
            result = result_of(MixtureWeights.of({}, self.names))
        return Selection(scores, result, {**known, "merge_method": "linear", **fields})


def result_of(mixture: MixtureWeights, num_trained: int = 0) -> SearchResult:
    """Return the result of a mixture that no candidates were tried for."""
    return SearchResult(mixture, math.nan, (), num_trained)


@dataclass(frozen=True, eq=False)
class Selection:
    """What a trial chose: the result with its weights, and what else a composition has of it.

    `scores` measures it on examples, by index. `members`, which are averaged, and `steps` are choices by name.
    """

    scores: Callable[[Sequence[int]], Scores]
    result: SearchResult
    fields: Mapping[str, Any]
    members: Mapping[str, Selection] = field(default_factory=dict)
    steps: Mapping[str, Selection] = field(default_factory=dict)

    def composition(self, report: Report, *, seed: int, allow_licenses: bool) -> Composition:
        """Return the choice as a composition, ready to answer."""

        def parts(choices: Mapping[str, Selection], reason: str) -> dict[str, Composition]:
            return {
                name: part.composition(replace(report, chosen=name, reason=reason), seed=seed, allow_licenses=allow_licenses)
                for name, part in choices.items()
            }

        weights, by_layer = self.weights()
        return Composition(
            all_weights=weights,
            by_layer=by_layer,
            report=report,
            seed=seed,
            allow_licenses=allow_licenses,
            members=parts(self.members, "a member of average"),
            steps=parts(self.steps, f"a step of {' > '.join(self.steps)}"),
            **self.fields,
        )

    def weights(self) -> tuple[dict[str, float], dict[str, dict[str, float]] | None]:
        """Return ({name: mean weight} of the adapters that have a weight somewhere, {layer: {name: weight}} or None)."""
        mixture = self.result.mixture
        # a weight that cancels out over the layers counts too
        used_E = mixture.values_BTLE.flatten(0, 2).any(dim=0).tolist()
        used = {name: mean for (name, mean), is_used in zip(mixture.means().items(), used_E, strict=True) if is_used}
        return used, mixture.by_layer() if mixture.layers else None

    def answers(self, pairs: Sequence[tuple[Any, str]]) -> tuple[Composition, np.ndarray]:
        """Return the choice as a composition, and whether it answers each input with its target."""
        # licenses were asked for when it was chosen
        made = self.composition(Report((), "", "", (), 0.0, 0), seed=0, allow_licenses=True)
        right_N = [
            answer == target.strip()
            for answer, (_, target) in zip(made.predict([text for text, _ in pairs]), pairs, strict=True)
        ]
        return made, np.array(right_N, dtype=np.float64)


class Trial(ABC):
    """One way to choose on splits of the examples, with what was measured: on held-out ones, and once finished on all.

    `learns` is True if the examples have a say in the choice, so that some must be held out to judge it.
    """

    learns = True

    def __init__(self, name: str, bench: Bench) -> None:
        self.name = name
        self.bench = bench
        self.evaluations = 0
        self.seconds = 0.0
        self.chosen: Selection | None = None
        self.losses_N: np.ndarray | None = None
        self._held_losses_N = self._held_hits_N = np.zeros(0)
        self._was_held_out = False
        self._known: dict[str, Selection] = {}

    @abstractmethod
    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        """Return a choice for each split, which knows nothing of the split's held-out examples."""

    def planned(self, num_folds: int) -> int | None:
        """Return how many evaluations its searches or trainings will make; None where only time bounds them."""
        return 0

    def count(self, made: int) -> None:
        """Count evaluations, and report them as progress."""
        self.evaluations += made
        self.bench.on_progress(made)

    @property
    def held_out_loss(self) -> float:
        """The mean loss on held-out examples; infinite where it is no number, and where there are no examples."""
        loss = float(self._held_losses_N.mean()) if self._held_losses_N.size else math.inf
        return loss if math.isfinite(loss) else math.inf

    def choices_on(self, splits: Sequence[Split]) -> list[Selection]:
        """Return the choices for these splits; none is made twice."""
        if missing := [split for split in splits if split.name not in self._known]:
            self._known |= {split.name: made for split, made in zip(missing, self.choose(missing), strict=True)}
        return [self._known[split.name] for split in splits]

    def run(self, folds: Sequence[Split]) -> None:
        """Choose on every fold and on all examples, and measure the choices on held-out examples and on all."""
        started = time.perf_counter()
        # a choice that sees no examples is the same for all folds, unless only some examples are held out
        folds = folds if self.learns or len(folds) == 1 else []
        self.choices_on([*folds, self.bench.everything])
        self.seconds += time.perf_counter() - started
        self.hold_out(folds)
        self.finish()

    def hold_out(self, folds: Sequence[Split]) -> None:
        """Measure the choices on the held-out examples of all folds."""
        started, self._was_held_out = time.perf_counter(), bool(folds)
        measured = [choice.scores(split.held) for split, choice in zip(folds, self.choices_on(folds), strict=True)]
        self._held_losses_N, self._held_hits_N = np.concatenate(measured, axis=1) if measured else np.zeros((2, 0))
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Choose on all examples, and measure that on all of them."""
        started, everything = time.perf_counter(), self.bench.everything
        (self.chosen,) = self.choices_on([everything])
        if everything.seen:
            self.losses_N, hits_N = self.chosen.scores(everything.seen)
            if not self._held_losses_N.size:
                self._held_losses_N, self._held_hits_N = self.losses_N, hits_N
        self.seconds += time.perf_counter() - started

    def row(self) -> ReportRow:
        """Return its row of a report."""
        held_out = bool(self._held_losses_N.size) and (self._was_held_out or not self.learns)
        row = ReportRow(
            name=self.name,
            weights={},
            loss=None if self.losses_N is None else float(self.losses_N.mean()),
            held_out_loss=self.held_out_loss if held_out else None,
            held_out_hits=float(self._held_hits_N.mean()) if held_out else None,
            seconds=self.seconds,
            evaluations=self.evaluations,
        )
        if self.chosen is None:
            return row
        result, (weights, by_layer) = self.chosen.result, self.chosen.weights()
        losses = tuple(loss if math.isfinite(loss) else None for loss in result.losses)
        return replace(
            row, weights=weights, by_layer=by_layer, num_trained=result.num_trained, failed=result.failed, losses=losses
        )


class Fixed(Trial):
    """A mixture that no example had a part in choosing."""

    learns = False

    def __init__(self, name: str, bench: Bench, mixture: MixtureWeights, merge_method: str = "linear") -> None:
        super().__init__(name, bench)
        self.evaluations = 1
        self._mixture, self._merge_method = mixture, merge_method

    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        return [self.bench.mixed(result_of(self._mixture), self._merge_method)] * len(splits)


class BestSingle(Trial):
    """The adapter of the lowest mean loss on the examples seen, with weight 1; the earlier one when equal."""

    def __init__(self, bench: Bench) -> None:
        super().__init__("best_single", bench)
        self.evaluations = len(bench.names)

    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        return [self._single(*self.bench.best(split.seen, 1)) for split in splits]

    def _single(self, name: str) -> Selection:
        losses_N, hits_N = (measured_EN[self.bench.names.index(name)] for measured_EN in self.bench.alone)
        result = result_of(MixtureWeights.of({name: 1.0}, self.bench.names))
        return self.bench.selection(lambda examples: (losses_N[list(examples)], hits_N[list(examples)]), result)
