"""A trial: one way to weigh the adapters of a pool, and what it comes to on the examples of a task.

Every trial is run the same way. It chooses once for each fold of a cross-validation, without the fold's held-out examples,
on which the choice is then measured; and it chooses once more on all examples, which is what a composition takes. The base
model and the uniform mixture choose the same whatever they see. Searches are in searched.py, what is trained in trained.py.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from rich.progress import Progress

from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.report import Report, ReportRow
from loraweave.composer.compose.scoring_workers import ScoringWorkers
from loraweave.composer.composer import Composer
from loraweave.composer.train.rows import MAX_PACKED
from loraweave.hub.adapter import Adapter
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.searches._told import SearchResult
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task


@dataclass(frozen=True)
class Split:
    """The indices of the examples that a choice sees, and of those it is measured on afterwards."""

    name: str
    seen: tuple[int, ...]
    held: tuple[int, ...] = ()


def folds(num_examples: int, count: int, seed: int) -> list[Split]:
    """Return at most `count` splits whose held-out examples cover all, in an order that depends on the seed alone."""
    count = min(count, num_examples)
    order = np.random.default_rng(seed).permutation(num_examples).tolist()
    held_out = [tuple(sorted(order[start::count])) for start in range(count)]
    return [
        Split(f"fold-{number}", tuple(index for index in range(num_examples) if index not in held), held)
        for number, held in enumerate(held_out)
    ]


def held_out(num_examples: int, seed: int) -> Split:
    """Return a split with a fifth of the examples held out, drawn by the seed."""
    return folds(num_examples, 5, seed)[0]


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
    def alone(self) -> tuple[np.ndarray, np.ndarray]:
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


Chosen = TypeVar("Chosen")


class Trial(ABC, Generic[Chosen]):
    """One way to choose on splits of the examples, with what was measured: on held-out ones, and once finished on all.

    `learns` is True if the examples have a say in the choice, so that some must be held out to judge it.
    """

    learns = True

    def __init__(self, name: str, bench: Bench, merge_method: str = "linear") -> None:
        self.name = name
        self.bench = bench
        # what the weights mean
        self.merge_method = merge_method
        self.evaluations = 0
        self.seconds = 0.0
        self.chosen: Chosen | None = None
        self.losses_N: np.ndarray | None = None
        self._held_losses_N = self._held_hits_N = np.zeros(0)
        self._was_held_out = False
        self._known: dict[str, Chosen] = {}

    @abstractmethod
    def choose(self, splits: Sequence[Split]) -> list[Chosen]:
        """Return a choice for each split, which knows nothing of the split's held-out examples."""

    @abstractmethod
    def scores(self, chosen: Chosen, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return (loss_N, hit_N) of a choice on these examples, without terms for its weights."""

    @abstractmethod
    def result(self, chosen: Chosen) -> SearchResult:
        """Return the choice's weights, and what it took to find them."""

    def planned(self, num_folds: int) -> int | None:
        """Return how many evaluations its searches or trainings will make; None where only time bounds them."""
        return 0

    def composition(self, chosen: Chosen, report: Report, *, seed: int, allow_licenses: bool) -> Composition:
        """Return a choice as a composition, ready to answer."""
        weights, by_layer = used_weights(self.result(chosen).mixture)
        return Composition(
            self.bench.engine.model,
            self.bench.tokenizer,
            all_weights=weights,
            by_layer=by_layer,
            report=report,
            seed=seed,
            allow_licenses=allow_licenses,
            **self.composition_fields(chosen),
        )

    def hits(self, chosen: Chosen, examples: Sequence[int]) -> tuple[Composition, np.ndarray]:
        """Return the choice as a composition, and whether it answers each of these examples with its target."""
        pairs = [self.bench.task.examples[place] for place in examples]
        # licenses were asked for when it was chosen
        made = self.composition(chosen, Report((), self.name, "", (), 0.0, 0), seed=0, allow_licenses=True)
        said = made.predict([text for text, _ in pairs])
        right_N = [answer == target.strip() for answer, (_, target) in zip(said, pairs, strict=True)]
        return made, np.array(right_N, dtype=np.float64)

    def composition_fields(self, chosen: Chosen) -> dict[str, Any]:
        """Return what a composition has of a choice beside its weights."""
        return {"task": self.bench.task, "pool": self.bench.engine.pool, "merge_method": self.merge_method}

    @property
    def held_out_loss(self) -> float:
        """The mean loss on held-out examples; infinite where it is no number, and where there are no examples."""
        loss = float(self._held_losses_N.mean()) if self._held_losses_N.size else math.inf
        return loss if math.isfinite(loss) else math.inf

    def choices_on(self, splits: Sequence[Split]) -> list[Chosen]:
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
        measured = [self.scores(chosen, split.held) for split, chosen in zip(folds, self.choices_on(folds), strict=True)]
        self._held_losses_N, self._held_hits_N = np.concatenate(measured, axis=1) if measured else np.zeros((2, 0))
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Choose on all examples, and measure that on all of them."""
        started, everything = time.perf_counter(), self.bench.everything
        (self.chosen,) = self.choices_on([everything])
        if everything.seen:
            self.losses_N, hits_N = self.scores(self.chosen, everything.seen)
            if not self._held_losses_N.size:
                self._held_losses_N, self._held_hits_N = self.losses_N, hits_N
        self.seconds += time.perf_counter() - started

    def row(self) -> ReportRow:
        """Return its row of a report."""
        result = None if self.chosen is None else self.result(self.chosen)
        used, by_layer = ({}, None) if result is None else used_weights(result.mixture)
        held_out = bool(self._held_losses_N.size) and (self._was_held_out or not self.learns)
        return ReportRow(
            name=self.name,
            weights=used,
            loss=None if self.losses_N is None else float(self.losses_N.mean()),
            held_out_loss=self.held_out_loss if held_out else None,
            held_out_hits=float(self._held_hits_N.mean()) if held_out else None,
            seconds=self.seconds,
            evaluations=self.evaluations,
            by_layer=by_layer,
            num_trained=0 if result is None else result.num_trained,
            failed=0 if result is None else result.failed,
            losses=() if result is None else tuple(loss if math.isfinite(loss) else None for loss in result.losses),
        )


def used_weights(mixture: MixtureWeights) -> tuple[dict[str, float], dict[str, dict[str, float]] | None]:
    """Return ({name: mean weight} of the adapters that have a weight somewhere, {layer: {name: weight}} or None)."""
    # a weight that cancels out over the layers counts too
    used_E = mixture.values_BTLE.flatten(0, 2).any(dim=0).tolist()
    used = {name: mean for (name, mean), is_used in zip(mixture.means().items(), used_E, strict=True) if is_used}
    return used, mixture.by_layer() if mixture.layers else None


def result_of(mixture: MixtureWeights, num_trained: int = 0) -> SearchResult:
    """Return the result of a mixture that no candidates were tried for."""
    return SearchResult(mixture, math.nan, (), num_trained)


class MixtureTrial(Trial[SearchResult]):
    """A trial whose choice is a mixture."""

    def scores(self, chosen: SearchResult, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        losses_CN, hits_CN = self.bench.loss(self.merge_method).view(examples).scores([chosen.mixture])
        return losses_CN[0], hits_CN[0]

    def result(self, chosen: SearchResult) -> SearchResult:
        return chosen


class Fixed(MixtureTrial):
    """A mixture that no example had a part in choosing."""

    learns = False

    def __init__(self, name: str, bench: Bench, mixture: MixtureWeights, merge_method: str = "linear") -> None:
        super().__init__(name, bench, merge_method)
        self.evaluations = 1
        self._mixture = mixture

    def choose(self, splits: Sequence[Split]) -> list[SearchResult]:
        return [result_of(self._mixture)] * len(splits)


class BestSingle(MixtureTrial):
    """The adapter of the lowest mean loss on the examples seen, with weight 1; the earlier one when equal.

    Making it measures all of them, on all examples.
    """

    def __init__(self, bench: Bench) -> None:
        super().__init__("best_single", bench)
        self.evaluations = len(bench.names)
        self._measured = bench.alone

    def choose(self, splits: Sequence[Split]) -> list[SearchResult]:
        return [result_of(MixtureWeights.of(self.bench.best(split.seen, 1), self.bench.names)) for split in splits]

    def scores(self, chosen: SearchResult, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        (name,) = (name for name, weight in chosen.mixture.means().items() if weight)
        losses_N, hits_N = (measured_EN[self.bench.names.index(name)] for measured_EN in self._measured)
        return losses_N[list(examples)], hits_N[list(examples)]
