"""The Shannon entropy of the model's predictions: how unsure it is, whatever is right (AdaMerging, Yang et al. 2023).

Where the task has labels, that of the distribution over them. Elsewhere the mean of the entropies over the vocabulary at the
places of the target's tokens; for inputs without targets these are answers of the model itself, written once and then kept,
so that the loss is a smooth function of the weights.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loraweave.composer.compose.objectives._row_sums import AllLabels, OneTarget, RowSums, log_shares
from loraweave.types import Task


class Entropy:
    """No target is looked at, but for where its tokens are."""

    differentiable: ClassVar[bool] = True

    def __init__(self, task: Task) -> None:
        self._labelled = bool(task.labels)
        self._answers = AllLabels(task) if task.labels else OneTarget(task)
        self.targets, self.right = self._answers.targets, self._answers.right
        self.hit_needs = self._answers.hit_needs
        self.needs = frozenset({"loss" if self._labelled else "entropy"})

    def losses(self, sums: RowSums) -> Tensor:
        """In nats; at most log of the number of labels, or of words."""
        if self._labelled:
            logs_NR = log_shares(sums)
            return -(logs_NR.exp() * logs_NR).sum(dim=1)
        return (sums.asked("entropy") / sums.count_NR)[:, 0]

    def hits(self, sums: RowSums) -> Tensor:
        """Whether the answer is the target; of no meaning for inputs without one."""
        return self._answers.hits(sums)
