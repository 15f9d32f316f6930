"""Any function of the model as an objective: it is called with one candidate's mixture active at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from loraweave.composer.composer import Composer
from loraweave.composer.evaluation.active_candidate import active_candidate
from loraweave.composer.evaluation.described_mixtures import described_mixtures
from loraweave.composer.evaluation.failures import Failures
from loraweave.composer.evaluation.on_examples import OnExamples
from loraweave.composer.evaluation.penalty import LORAHUB_L1, Penalty
from loraweave.composer.untouched import untouched
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Task

Examples = list[tuple[str, str]]


class UserLoss(OnExamples):
    """An objective: `function(model, examples)`, a number, lower is better, and the terms of ExampleLoss.

    `model` answers for the candidate, in evaluation mode and without gradients; `examples` are (input, target) pairs. A
    candidate for which the function raises an error or gives no finite number has the loss NaN; `failures` counts these.
    Raises WeightingError for terms that cannot be used.
    """

    differentiable = False

    def __init__(
        self,
        engine: Composer,
        task: Task,
        function: Callable[[Any, Examples], float],
        *,
        merge_method: str = "linear",
        l1: float = LORAHUB_L1,
        l2: float = 0.0,
        sparsity: float = 0.0,
        only: Sequence[int] | None = None,
    ) -> None:
        self.engine = engine
        self.task = task
        self.function = function
        self.merge_method = merge_method
        self.penalty = Penalty(l1, l2, sparsity)
        self.only = tuple(range(len(task.examples)) if only is None else only)
        self.failures = Failures()

    def describe(self) -> dict[str, Any]:
        """What the losses depend on; of the function itself the name alone."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return {
            "function": name,
            "instruction": self.task.instruction,
            "examples": [list(self.task.examples[index]) for index in self.only],
            **described_mixtures(self.engine, self.merge_method, self.penalty),
        }

    def __call__(self, candidates: Sequence[MixtureWeights]) -> list[float]:
        return [self._loss(candidate) for candidate in candidates]

    def _loss(self, candidate: MixtureWeights) -> float:
        examples = [self.task.examples[index] for index in self.only]
        try:
            with untouched(self.engine.model), torch.no_grad(), active_candidate(self.engine, candidate, self.merge_method):
                loss = float(self.function(self.engine.model, list(examples)))
        # an interruption is no Exception, and ends the search
        except Exception as error:
            self.failures.add(error)
            return math.nan
        if not math.isfinite(loss):
            self.failures.add(f"its loss is {loss}")
            return math.nan
        return loss + float(self.penalty(candidate.values_BTLE))
