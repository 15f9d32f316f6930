"""The share of examples that the model would answer wrongly, by greedy decoding or with the likeliest label."""

from typing import ClassVar

from torch import Tensor

from loraweave.composer.compose.objectives._row_sums import Kind, RowSums
from loraweave.types import Task


class ExactMatch(Kind):
    """The misses: 1 for an example whose answer is not its target, else 0; without gradients.

    No text is generated: greedy decoding writes a target exactly when, with the target's own tokens before it, each of them
    is the most likely one, the end-of-sequence token included. An answer that goes on with a line break counts as wrong
    here, where `Composition.evaluate` cuts it off.
    """

    differentiable: ClassVar[bool] = False

    def __init__(self, task: Task) -> None:
        super().__init__(task, task.labels)
        self.needs = self.hit_needs

    def losses(self, sums: RowSums) -> Tensor:
        """Return loss_N: 0 for an example that is answered with its target, else 1."""
        return (~self.hits(sums)).float()
