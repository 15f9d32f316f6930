"""A trial: one way to answer a task, with its losses on the task's examples.

Every trial runs the same way. For each fold of a cross-validation it makes a choice without the fold's held-out examples,
on which the choice is then measured. It makes one more choice from all examples, and that is the one that a composition
takes. The base model and the uniform mixture make the same choice whatever examples they see.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import compress
from pathlib import Path
from typing import Any

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
from loraweave.types import Task, with_pairs

NO_REPORT = Report((), "", "", (), 0.0, 0)
# (loss_N, hit_N) on some examples, without terms for the weights
Scores = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Split:
    """The indices of the examples that a choice may use (`seen`), and of the held-out ones that measure it (`held`)."""

    name: str
    seen: tuple[int, ...]
    held: tuple[int, ...] = ()


def splits_of(task: Task, settings: Settings) -> list[Split]:
    """Return the splits with held-out examples: one with a fifth of many examples, or the folds for a method that learns.

    The seed draws them. The folds together hold out every example once; there are at most as many folds as examples.
    """
    num_examples, is_many = len(task.examples), settings.has_many(task)
    count = min(5 if is_many else settings.folds if settings.learns else 0, num_examples)
    order = np.random.default_rng(settings.seed).permutation(num_examples).tolist()
    splits = []
    for number in range(1 if is_many else count):
        held = tuple(sorted(order[number::count]))
        splits.append(Split(f"fold-{number}", tuple(index for index in range(num_examples) if index not in held), held))
    return splits


@dataclass(frozen=True, eq=False)
class Bench:
    """The state that all trials of a task share: its examples, and the losses of each adapter alone, computed on first use.

    `scores` are retrieval scores by adapter. `on_progress` is called with the number of evaluations just made; with
    `progress` a training shows a bar of its own. A training under demonstrations begins as the adapter `start`, or as a new
    one without it; the steps of programs are adapters of the `retriever`'s hub. With `turned`, an example that the prompts
    show is measured under the prompt that `in_turn` gives it. The `workers` run the forward passes of a generation of
    candidates, of all splits together.
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
    workers: Any = None
    _losses: dict[str, ExampleLoss] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return self.engine.pool.names

    def with_demonstrations(self, orders: int = 1) -> Bench:
        """Return a bench where every prompt shows the first other examples, unless the task shows some already."""
        if self.task.demonstrations:
            return self
        shown = self.task.examples[:MAX_PACKED]
        return replace(self, task=with_pairs(self.task, demonstrations=shown, orders=orders), turned=True, _losses={})

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
        """The losses and hits (loss_EN, hit_EN) of each adapter alone, with weight 1, on all examples."""
        measured = self.loss().scores([MixtureWeights.of({name: 1.0}, self.names) for name in self.names])
        self.on_progress(len(self.names))
        return measured

    def best(self, examples: Sequence[int], count: int) -> dict[str, float]:
        """Return equal weights of sum 1 for the `count` adapters, or fewer, of the lowest mean losses on these examples."""
        means_E = self.alone[0][:, list(examples)].mean(axis=1)
        # stable, so that of equal losses the earlier comes first; NaN comes last
        order = np.argsort(means_E, kind="stable")[:count]
        return {self.names[place]: 1 / len(order) for place in order}

    def mixed(self, result: SearchResult, merge_method: str = "linear") -> Selection:
        """Return the selection of a search's best mixture; `merge_method` is the merge that its weights are for."""
        return self.selection(
            # a task without examples has no loss
            lambda examples: self.loss(merge_method).scores_on(result.mixture, examples),
            result,
            merge_method=merge_method,
        )

    def selection(
        self, scores: Callable[[Sequence[int]], Scores], result: SearchResult | None = None, **fields: Any
    ) -> Selection:
        """Return a selection whose composition has these fields; without a `result`, no adapter of the pool has a weight."""
        result = result or SearchResult(MixtureWeights.of({}, self.names))
        mixture = result.mixture
        # a weight that cancels out over the layers counts too
        used_E = mixture.values_BTLE.flatten(0, 2).any(dim=0).tolist()
        used = dict(compress(mixture.means().items(), used_E))
        known = {"task": self.task, "pool": self.engine.pool, "merge_method": "linear", "all_weights": used, **fields}
        # the pool's licenses were checked before; `reported` sets what the caller allows
        made = Composition(self.engine.model, self.tokenizer, report=NO_REPORT, allow_licenses=True, **known)
        return Selection(scores, result, replace(made, by_layer=mixture.by_layer() if mixture.layers else None))


@dataclass(frozen=True, eq=False)
class Selection:
    """The choice of a trial: a search result with its weights, and the composition made of it, which has no report yet.

    `scores` returns the composition's losses and hits on the examples of these indices.
    """

    scores: Callable[[Sequence[int]], Scores]
    result: SearchResult
    composition: Composition

    def answers(self, pairs: Sequence[tuple[Any, str]]) -> np.ndarray:
        """Return right_N, 1.0 for each input that the composition answers with its target, else 0.0."""
        answers = self.composition.predict([text for text, _ in pairs])
        right_N = [answer == target.strip() for answer, (_, target) in zip(answers, pairs, strict=True)]
        return np.array(right_N, dtype=np.float64)


def reported(made: Composition, report: Report, **fields: Any) -> Composition:
    """Return the composition with the report, and its parts with copies that name the part; `fields` are set in all."""
    members, steps = dict[str, Composition](), dict[str, Composition]()
    for name, member in made.members.items():
        members[name] = reported(member, replace(report, chosen=name, reason="a member of average"), **fields)
    for name, step in made.steps.items():
        reason = f"a step of {' > '.join(made.steps)}"
        steps[name] = reported(step, replace(report, chosen=name, reason=reason), **fields)
    return replace(made, report=report, members=members, steps=steps, **fields)


# a function that makes a selection for each split without using the split's held-out examples
Choose = Callable[["Trial", Sequence[Split]], list[Selection]]


@dataclass(eq=False)
class Trial:
    """One way to answer a task: its selections for splits of the examples, and their losses, held out and on all examples.

    `choose` returns a selection for each split, which knows nothing of the split's held-out examples. `learns` is True if a
    selection depends on the examples, so that some must be held out to judge it. `cost` is the number of evaluations that a
    selection takes; None where only time bounds them. Only an average of trials has `average`, which returns the mean of
    their losses on all examples once they have finished.
    """

    name: str
    bench: Bench
    choose: Choose
    learns: bool = True
    cost: int | None = 0
    evaluations: int = 0
    average: Callable[[], np.ndarray] | None = None
    seconds: float = 0.0
    chosen: Selection | None = None
    losses_N: np.ndarray | None = None
    _held_losses_N: np.ndarray = field(default_factory=partial(np.zeros, 0))
    _held_hits_N: np.ndarray = field(default_factory=partial(np.zeros, 0))
    _was_held_out: bool = False
    _known: dict[str, Selection] = field(default_factory=dict)

    def count(self, made: int) -> None:
        """Count evaluations, and report them as progress."""
        self.evaluations += made
        self.bench.on_progress(made)

    @property
    def held_out_loss(self) -> float:
        """The mean loss on held-out examples; infinite if it is NaN, or if no examples were held out."""
        loss = float(self._held_losses_N.mean()) if self._held_losses_N.size else math.inf
        return loss if math.isfinite(loss) else math.inf

    def choices_on(self, splits: Sequence[Split]) -> list[Selection]:
        """Return a selection for each split; make only those that have not been made yet."""
        if missing := [split for split in splits if split.name not in self._known]:
            self._known.update(zip([split.name for split in missing], self.choose(self, missing), strict=True))
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
        """Make the selection from all examples, and measure it on all of them."""
        started, everything = time.perf_counter(), self.bench.everything
        (self.chosen,) = self.choices_on([everything])
        if self.average is not None:
            self.losses_N = self.average()
        elif everything.seen:
            self.losses_N, hits_N = self.chosen.scores(everything.seen)
            if not self._held_losses_N.size:
                self._held_losses_N, self._held_hits_N = self.losses_N, hits_N
        self.seconds += time.perf_counter() - started

    def row(self) -> ReportRow:
        """Return the trial's row of a report."""
        held_out = bool(self._held_losses_N.size) and (self._was_held_out or not self.learns)
        row = ReportRow(
            name=self.name,
            weights={},
            loss=None if self.losses_N is None else float(self.losses_N.mean()),
            held_out_loss=self.held_out_loss if held_out else None,
            held_out_hits=float(self._held_hits_N.mean()) if held_out else None,
            seconds=self.seconds,
            evaluations=self.evaluations,
            num_held_out=len(self._held_hits_N) if held_out else 0,
        )
        if self.chosen is None:
            return row
        result, made = self.chosen.result, self.chosen.composition
        losses = tuple(loss if math.isfinite(loss) else None for loss in result.losses)
        row = replace(row, num_trained=result.num_trained, failed=losses.count(None), losses=losses)
        return replace(row, weights=made.all_weights, by_layer=made.by_layer)


def fixed(name: str, bench: Bench, mixture: MixtureWeights, merge_method: str = "linear") -> Trial:
    """Return the trial of a mixture that does not depend on the examples."""
    choice = bench.mixed(SearchResult(mixture), merge_method)
    return Trial(name, bench, lambda _, splits: [choice] * len(splits), learns=False, evaluations=1)


def best_single(bench: Bench) -> Trial:
    """Return the trial of the adapter with the lowest mean loss on a split's seen examples, the earlier of equal ones."""

    def choose(_: Trial, splits: Sequence[Split]) -> list[Selection]:
        choices = []
        for split in splits:
            (name,) = best = bench.best(split.seen, 1)
            scores = partial(_alone_on, bench, bench.names.index(name))
            choices.append(bench.selection(scores, SearchResult(MixtureWeights.of(best, bench.names))))
        return choices

    return Trial("best_single", bench, choose, evaluations=len(bench.names))


def _alone_on(bench: Bench, place: int, examples: Sequence[int]) -> Scores:
    """Return one adapter's (loss_N, hit_N) on these examples; `place` is its number in the pool."""
    losses_EN, hits_EN = bench.alone
    return losses_EN[place, list(examples)], hits_EN[place, list(examples)]
