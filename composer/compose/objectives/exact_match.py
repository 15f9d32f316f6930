"""The share of examples that the model would answer wrongly, by greedy decoding or with the likeliest label."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loraweave.composer.compose.objectives._row_sums import AllLabels, OneTarget, RowSums
from loraweave.types import Task


class ExactMatch:
    """1 for an example whose answer is not its target, else 0; without gradients.

    No text is generated: greedy decoding writes a target exactly when, with the target's own tokens before it, each of them
    is the most likely one, the end-of-sequence token included. An answer that goes on with a line break counts as wrong
    here, where `Composition.evaluate` cuts it off.
    """

    differentiable: ClassVar[bool] = False

    def __init__(self, task: Task) -> None:
        self._answers = AllLabels(task) if task.labels else OneTarget(task)
        self.targets, self.right = self._answers.targets, self._answers.right
        self.needs = self.hit_needs = self._answers.hit_needs

    def losses(self, sums: RowSums) -> Tensor:
        """0 or 1."""
        return (~self.hits(sums)).float()

    def hits(self, sums: RowSums) -> Tensor:
        """Whether the answer is the target."""
        return self._answers.hits(sums)
