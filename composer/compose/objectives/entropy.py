"""The Shannon entropy of the model's predictions: how unsure it is, whatever is right (AdaMerging, Yang et al. 2023).

For a task with labels it is the entropy of the distribution over them; otherwise the mean entropy over the vocabulary at the
positions of the target's tokens. Inputs without targets get answers of the model itself as targets, written once and then
kept, so that the loss is a smooth function of the weights.
"""

from torch import Tensor

from loraweave.composer.compose.objectives._row_sums import ENTROPY, Kind, RowSums
from loraweave.types import Task


class Entropy(Kind):
    """The entropy of predictions, which depends on a target only through the places of its tokens."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, task.labels)
        if not self.labels:
            self.needs = frozenset({ENTROPY})

    def losses(self, sums: RowSums) -> Tensor:
        """Return each example's entropy in nats, at most the log of the number of labels, or of words."""
        if self.labels:
            logs_NR = sums.log_shares()
            return -(logs_NR.exp() * logs_NR).sum(dim=1)
        return (sums.sums[ENTROPY] / sums.count_NR)[:, 0]
