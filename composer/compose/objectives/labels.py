"""Ranking of labels: minus the logarithm of the target's share of the likelihood of all of the task's labels."""

from torch import Tensor

from loraweave.composer.compose.objectives._row_sums import Kind, RowSums
from loraweave.errors import InvalidTask
from loraweave.types import Task


class Labels(Kind):
    """The ranking loss -log softmax over the labels' summed log-likelihoods, at the target; predictions rank by these sums.

    A label ends with the end-of-sequence token. Raises InvalidTask for a task without labels.
    """

    def __init__(self, task: Task) -> None:
        if not task.labels:
            raise InvalidTask(
                "objective 'labels' ranks the labels of a task, but this task has none: give Task(..., labels=[...]), or "
                "take 'cross_entropy'"
            )
        super().__init__(task, task.labels)

    def losses(self, sums: RowSums) -> Tensor:
        """Return loss_N in nats, which is the log of the number of labels if all are equally likely."""
        return -sums.log_shares().gather(1, sums.right_N[:, None])[:, 0]
