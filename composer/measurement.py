"""Measures mixtures on the few examples of a task, cross-validated where examples had a part in choosing them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from loraweave.composer.composer import Composer
from loraweave.composer.example_loss import ExampleLoss
from loraweave.composer.report import ReportRow
from loraweave.routers.lorahub import Lorahub
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Task

Weights = Mapping[str, float]
Choice = Callable[[Sequence[int], str], Weights]
Scores = Callable[[Weights, Sequence[int]], tuple[np.ndarray, np.ndarray]]


class Measurement:
    """Rows of a report for one engine and one task. `folds` are lists of example indices; none means nothing is held out."""

    def __init__(self, engine: Composer, tokenizer: Any, task: Task, folds: Sequence[Sequence[int]]) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.task = task
        self.folds = folds
        self.names = engine.pool.names
        self.everything = list(range(len(task.examples)))
        self._live = ExampleLoss(engine, tokenizer, task, l1=0.0)

    @cached_property
    def singles(self) -> tuple[np.ndarray, np.ndarray]:
        """(loss_EN, hit_EN) of every adapter alone, with weight 1."""
        return self._live.scores([self._mixture({name: 1.0}) for name in self.names])

    def best_single(self, examples: Sequence[int], part: str = "") -> dict[str, float]:
        """The adapter of the lowest mean loss on these examples, with weight 1; the earlier one when equal."""
        means_E = self.singles[0][:, list(examples)].mean(axis=1)
        return {self.names[int(means_E.argmin())]: 1.0}

    def fixed(self, name: str, weights: Weights) -> ReportRow:
        """A mixture that no example had a part in choosing; one evaluation."""
        scores = partial(self._scores, merge_method="linear")
        return self.chosen(name, lambda examples, part: weights, lambda: 1, scores, cross_validate=False)

    def best_single_row(self) -> ReportRow:
        """The best single adapter, chosen anew for each fold; one evaluation for each adapter, and no further one."""
        return self.chosen("best_single", self.best_single, lambda: len(self.names), self._single_scores)

    def searched(
        self,
        *,
        budget: int,
        seed: int,
        l1: float,
        merge_method: str,
        checkpoint: Path | None,
        on_progress: Callable[[int], object],
        options: Mapping[str, Any],
    ) -> ReportRow:
        """LoraHub, started at the best single adapter; each fold has a search of its own on the other examples."""
        made = [0]

        def choose(examples: Sequence[int], part: str) -> Weights:
            objective = self._loss(examples, merge_method, l1)
            start = self.best_single(examples)
            solver = Lorahub(self.names, budget=budget, seed=seed, start=start, **options)
            log = None if checkpoint is None else checkpoint / f"{part}.json"
            result = solver.solve(objective, checkpoint=log, on_progress=on_progress)
            made[0] += result.evaluations
            return result.weights

        return self.chosen("lorahub", choose, lambda: made[0], partial(self._scores, merge_method=merge_method))

    def chosen(
        self,
        name: str,
        choose: Choice,
        evaluations: Callable[[], int],
        scores: Scores,
        *,
        cross_validate: bool = True,
    ) -> ReportRow:
        """The row of what `choose` makes of all examples, and for held-out figures of all examples but each fold."""
        started = time.perf_counter()
        weights = choose(self.everything, "all")
        losses_N, hits_N = scores(weights, self.everything)
        held_losses, held_hits = losses_N.copy(), hits_N.copy()
        for number, fold in enumerate(self.folds if cross_validate else ()):
            seen = [index for index in self.everything if index not in fold]
            fold_weights = choose(seen, f"fold-{number}")
            held_losses[list(fold)], held_hits[list(fold)] = scores(fold_weights, fold)
        return ReportRow(
            name=name,
            weights=dict(weights),
            loss=float(losses_N.mean()),
            held_out_loss=float(held_losses.mean()),
            held_out_hits=float(held_hits.mean()),
            seconds=time.perf_counter() - started,
            evaluations=evaluations(),
        )

    def _single_scores(self, weights: Weights, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(loss_N, hit_N) of one adapter with weight 1, looked up: all of them have been measured together."""
        (name,) = weights
        losses_EN, hits_EN = self.singles
        row, columns = self.names.index(name), list(examples)
        return losses_EN[row, columns], hits_EN[row, columns]

    def _scores(self, weights: Weights, examples: Sequence[int], merge_method: str) -> tuple[np.ndarray, np.ndarray]:
        losses_CN, hits_CN = self._loss(examples, merge_method, 0.0).scores([self._mixture(weights)])
        return losses_CN[0], hits_CN[0]

    def _loss(self, examples: Sequence[int], merge_method: str, l1: float) -> ExampleLoss:
        return ExampleLoss(self.engine, self.tokenizer, self.task, merge_method=merge_method, l1=l1, only=examples)

    def _mixture(self, weights: Weights) -> MixtureWeights:
        return MixtureWeights.of(weights, self.names)
