"""Measures ways of composing on the few examples of a task, cross-validated where the examples have a say in them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.report import ReportRow
from loraweave.composer.compose.routed_examples import RoutedExamples
from loraweave.composer.composer import Composer
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router, Task


@dataclass(eq=False)
class Trial:
    """A way, and what was measured of it: on held-out examples, and once it is finished on all."""

    way: Way
    seconds: float = 0.0
    held_losses_N: np.ndarray = field(default_factory=lambda: np.zeros(0))
    held_hits_N: np.ndarray = field(default_factory=lambda: np.zeros(0))
    choice: Choice | None = None
    losses_N: np.ndarray | None = None
    fold_choices: list[Choice] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.way.name

    @property
    def held_out_loss(self) -> float:
        """Infinite where it is no number, so that nothing is worse, and where there are no examples."""
        loss = float(self.held_losses_N.mean()) if self.held_losses_N.size else math.inf
        return loss if math.isfinite(loss) else math.inf

    def row(self) -> ReportRow:
        """The way's row of a report. Its weights are those that a training began as, where it went on from there."""
        choice = self.choice
        origin = choice if choice is None or choice.origin is None else choice.origin
        by_layer = origin.mixture.by_layer() if origin is not None and origin.mixture.layers else None
        return ReportRow(
            name=self.name,
            weights={} if origin is None else _used_means(origin.mixture),
            loss=None if self.losses_N is None else float(self.losses_N.mean()),
            held_out_loss=self.held_out_loss if self.held_losses_N.size else None,
            held_out_hits=float(self.held_hits_N.mean()) if self.held_hits_N.size else None,
            seconds=self.seconds,
            evaluations=self.way.evaluations,
            by_layer=by_layer,
            num_trained=0 if choice is None else choice.num_trained,
            failed=0 if choice is None else choice.failed,
            losses=() if choice is None else tuple(loss if math.isfinite(loss) else None for loss in choice.losses),
        )


class Measurement:
    """Trials on one task. `folds` are the parts of cross-validation; none means that nothing is held out.

    `loss` is that of sums of updates over all examples, without terms for the weights; None where there are no examples.
    """

    def __init__(self, tokenizer: Any, task: Task, folds: Sequence[Part], loss: ExampleLoss | None) -> None:
        self._tokenizer = tokenizer
        self._task = task
        self.folds = folds
        self._all = whole(len(task.examples))
        self._routed: dict[Composer, RoutedExamples] = {}
        self._losses: dict[tuple[Composer, str], ExampleLoss] = {}
        if loss is not None:
            self._losses[loss.engine, loss.merge_method] = loss

    def trial(self, way: Way) -> Trial:
        """The way measured on held-out examples and on all."""
        trial = Trial(way)
        started = time.perf_counter()
        folds = self.folds if way.learns else []
        *trial.fold_choices, trial.choice = way.choose([*folds, self._all])
        self._hold_out(trial)
        self._finish(trial)
        trial.seconds = time.perf_counter() - started
        return trial

    def held_out(self, way: Way) -> Trial:
        """The way measured on held-out examples only."""
        trial = Trial(way)
        started = time.perf_counter()
        trial.fold_choices = way.choose(self.folds)
        self._hold_out(trial)
        trial.seconds = time.perf_counter() - started
        return trial

    def finished(self, trial: Trial) -> Trial:
        """The trial with the way's choice on all examples, too."""
        if trial.choice is None:
            started = time.perf_counter()
            (trial.choice,) = trial.way.choose([self._all])
            self._finish(trial)
            trial.seconds += time.perf_counter() - started
        return trial

    def _hold_out(self, trial: Trial) -> None:
        if not trial.fold_choices:
            return
        trial.held_losses_N, trial.held_hits_N = np.zeros(len(self._all.seen)), np.zeros(len(self._all.seen))
        for part, choice in zip(self.folds, trial.fold_choices, strict=True):
            held = list(part.held)
            trial.held_losses_N[held], trial.held_hits_N[held] = self._scores(choice, part.held)

    def _finish(self, trial: Trial) -> None:
        assert trial.choice is not None
        if not self._all.seen:
            return
        trial.losses_N, hits_N = self._scores(trial.choice, self._all.seen)
        if not trial.fold_choices:
            trial.held_losses_N, trial.held_hits_N = trial.losses_N, hits_N

    def _scores(self, choice: Choice, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(loss_N, hit_N) of a choice on these examples, without terms for its weights."""
        if choice.known is not None:
            losses_N, hits_N = choice.known
            return losses_N[list(examples)], hits_N[list(examples)]
        if choice.router is not None:
            return self._routed_examples(choice.engine).scores(choice.router, examples)
        loss = self._loss(choice).view(examples)
        losses_CN, hits_CN = loss.scores([choice.mixture])
        return losses_CN[0], hits_CN[0]

    def _routed_examples(self, engine: Composer) -> RoutedExamples:
        """The examples as rows, tokenised once for each engine."""
        if engine not in self._routed:
            self._routed[engine] = RoutedExamples(engine, self._tokenizer, self._task)
        return self._routed[engine]

    def _loss(self, choice: Choice) -> ExampleLoss:
        """The loss by the choice's engine, tokenised once for each."""
        key = choice.engine, choice.merge_method
        if key not in self._losses:
            self._losses[key] = ExampleLoss(
                choice.engine, self._tokenizer, self._task, merge_method=choice.merge_method, l1=0.0
            )
        return self._losses[key]


def _used_means(mixture: MixtureWeights) -> dict[str, float]:
    """{name: mean weight} of the experts that have a weight in some layer, also where these cancel out."""
    used_E = mixture.values_BTLE.flatten(0, 2).any(dim=0).tolist()
    return {name: mean for (name, mean), used in zip(mixture.means().items(), used_E, strict=True) if used}


@dataclass(frozen=True, eq=False)
class Choice:
    """A mixture over the experts of `engine`, and what `merge_method` makes of its weights.

    `losses` are those of the search's candidates in their order. `known` is (loss_N, hit_N) on all examples where they have
    been measured already. `adapter` is what a mixture was trained on to for `tuned_steps`: the engine then has it as an
    expert, of weight 1, and `origin` is the choice that it began as. Where there is a `router`, it counts and no mixture.
    """

    engine: Composer
    mixture: MixtureWeights
    merge_method: str = "linear"
    num_trained: int = 0
    failed: int = 0
    losses: tuple[float, ...] = ()
    known: tuple[np.ndarray, np.ndarray] | None = None
    adapter: Adapter | None = None
    origin: Choice | None = None
    tuned_steps: int = 0
    router: Router | None = None


class Way(Protocol):
    """A way to choose a mixture by the examples that a part sees; `learns` says whether these have a say in it."""

    name: str
    learns: bool
    evaluations: int

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        """A choice for each part, which knows nothing of the part's held-out examples."""
        ...


@dataclass(frozen=True)
class Part:
    """Indices of the examples that a choice sees, and of those it is measured on afterwards."""

    name: str
    seen: tuple[int, ...]
    held: tuple[int, ...] = ()


def whole(num_examples: int) -> Part:
    """All examples, and none held out."""
    return Part("all", tuple(range(num_examples)))


def folds(num_examples: int, count: int, seed: int) -> list[Part]:
    """At most `count` parts whose held-out examples cover all, in a shuffled order that depends on the seed alone."""
    count = min(count, num_examples)
    order = np.random.default_rng(seed).permutation(num_examples).tolist()
    held_out = [tuple(sorted(order[start::count])) for start in range(count)]
    return [
        Part(f"fold-{number}", tuple(index for index in range(num_examples) if index not in held), held)
        for number, held in enumerate(held_out)
    ]
