"""What an objective is made of: sums over the target tokens of each row, and what they mean for an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from loraweave.types import Task


@dataclass(frozen=True, eq=False)
class RowSums:
    """Of N examples with R rows each, summed over a row's target tokens; None where it was not asked for.

    loss: negative log-likelihoods; miss: how many tokens are not the most likely one; entropy: that of the predicted
    distributions, in nats. count_NR has the number of target tokens, right_N which of its rows is an example's target.
    `num_targets` counts the tokens of the targets of all examples of the loss, of which these N may be a part.
    """

    count_NR: Tensor
    right_N: Tensor
    num_targets: int
    loss_NR: Tensor | None = None
    miss_NR: Tensor | None = None
    entropy_NR: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[RowSums]) -> RowSums:
        """Those of the parts' examples, in order; of all parts the same have been asked for."""
        if len(parts) == 1:
            return parts[0]

        def whole(name: str) -> Tensor | None:
            own = [getattr(part, name) for part in parts]
            return None if own[0] is None else torch.cat(own)

        count_NR = torch.cat([part.count_NR for part in parts])
        right_N = torch.cat([part.right_N for part in parts])
        return cls(count_NR, right_N, parts[0].num_targets, whole("loss_NR"), whole("miss_NR"), whole("entropy_NR"))

    def asked(self, name: str) -> Tensor:
        """One of the three, which has been asked for."""
        found = {"loss": self.loss_NR, "miss": self.miss_NR, "entropy": self.entropy_NR}[name]
        assert found is not None
        return found


class Kind(Protocol):
    """A kind of loss on the examples of one task.

    `needs` and `hit_needs` name the sums that `losses` and `hits` look at; `differentiable` says whether gradients of
    `losses` mean anything. `targets` has the texts that follow each example's prompt, as many for each.
    """

    differentiable: ClassVar[bool]

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def hit_needs(self) -> frozenset[str]: ...

    @property
    def targets(self) -> Sequence[Sequence[str]]: ...

    @property
    def right(self) -> Sequence[int]:
        """Which of an example's texts is its target."""
        ...

    def losses(self, sums: RowSums) -> Tensor:
        """loss_N, one for each example."""
        ...

    def hits(self, sums: RowSums) -> Tensor:
        """hit_N: whether the model would answer with the target."""
        ...


class OneTarget:
    """For kinds that look at each example's own target alone."""

    def __init__(self, task: Task) -> None:
        self.targets = tuple((target,) for _, target in task.examples)
        self.right = (0,) * len(self.targets)

    @property
    def hit_needs(self) -> frozenset[str]:
        return frozenset({"miss"})

    def hits(self, sums: RowSums) -> Tensor:
        """Whether greedy decoding would write the target and then end."""
        return sums.asked("miss")[:, 0] == 0


class AllLabels:
    """For kinds that compare the labels of a task."""

    def __init__(self, task: Task) -> None:
        labels = tuple(task.labels or ())
        self.targets = (labels,) * len(task.examples)
        self.right = tuple(labels.index(target) for _, target in task.examples)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss"})

    @property
    def hit_needs(self) -> frozenset[str]:
        return frozenset({"loss"})

    def hits(self, sums: RowSums) -> Tensor:
        """Whether the target has the highest likelihood of all labels."""
        return sums.asked("loss").argmin(dim=1) == sums.right_N


def log_shares(sums: RowSums) -> Tensor:
    """The logarithm of each label's share of the likelihood of all labels, log_NR."""
    return torch.log_softmax(-sums.asked("loss"), dim=1)
