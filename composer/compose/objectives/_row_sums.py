"""The material of objectives: sums over the target tokens of each row, and what they mean for an example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.types import Task

# the names of the sums: of negative log-likelihoods, of tokens that are not the most likely ones, and of the entropies of
# the predicted distributions, in nats
LOSS, MISS, ENTROPY = "loss", "miss", "entropy"


@dataclass(frozen=True, eq=False)
class RowSums:
    """Sums over the target tokens of each row, {name: (N, R)} for N examples with R rows each.

    count_NR is a row's number of target tokens, right_N the index of the row with an example's own target. `num_targets`
    counts the target tokens of all the loss's examples; these N may be only some of them.
    """

    count_NR: Tensor
    right_N: Tensor
    num_targets: int
    sums: Mapping[str, Tensor]

    @classmethod
    def join(cls, parts: Sequence[RowSums]) -> RowSums:
        """Return the sums of all parts' examples, in order; the parts have the same names."""
        first = parts[0]
        if len(parts) == 1:
            return first
        sums = {name: torch.cat([part.sums[name] for part in parts]) for name in first.sums}
        count_NR, right_N = torch.cat([part.count_NR for part in parts]), torch.cat([part.right_N for part in parts])
        return cls(count_NR, right_N, first.num_targets, sums)

    @property
    def negative_logs(self) -> Tensor:
        """The negative log-likelihood of each row's target (N, R)."""
        return self.sums[LOSS]

    def log_shares(self) -> Tensor:
        """Return log_NR, the logarithm of each label's share of the likelihood of all labels."""
        return torch.log_softmax(-self.negative_logs, dim=1)


class Kind(ABC):
    """A kind of loss on the examples of one task.

    `targets` are the texts that follow each example's prompt: its own target, or all `labels`; `right` has the index of its
    target among them. `needs` and `hit_needs` name the sums that `losses` and `hits` read. `differentiable` is True if
    `losses` has useful gradients.
    """

    differentiable: ClassVar[bool] = True

    def __init__(self, task: Task, labels: Sequence[str] | None = None) -> None:
        self.labels = tuple(labels or ())
        self.targets: list[tuple[str, ...]] = []
        self.right: list[int] = []
        for _, target in task.examples:
            texts = self.labels or (target,)
            self.targets.append(texts)
            self.right.append(texts.index(target))
        self.needs = frozenset({LOSS})
        self.hit_needs = frozenset({LOSS if self.labels else MISS})

    @abstractmethod
    def losses(self, sums: RowSums) -> Tensor:
        """Return loss_N, one loss for each example."""

    def hits(self, sums: RowSums) -> Tensor:
        """Return hit_N: whether the target is the likeliest label or, without labels, what greedy decoding would write."""
        return sums.negative_logs.argmin(dim=1) == sums.right_N if self.labels else sums.sums[MISS][:, 0] == 0
