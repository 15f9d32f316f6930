"""The mean negative log-likelihood of the target's tokens, the end-of-sequence token included."""

from torch import Tensor

from loraweave.composer.compose.objectives._row_sums import Kind, RowSums


class CrossEntropy(Kind):
    """The mean negative log-likelihood, in which each example counts the same, however long its target."""

    def losses(self, sums: RowSums) -> Tensor:
        """Return loss_N, the mean over the tokens of each example's target, in nats."""
        return (sums.negative_logs / sums.count_NR)[:, 0]
