"""What an ensemble predicts: its members' distributions, their average, and how far they agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class EnsemblePrediction:
    """Distributions over outcomes on the last axis, averaged as probabilities: p = sum over members of w_m p_m.

    `members_MBV` are the log-probabilities of each member for each row, with an axis of positions before the last where
    several were asked for; weight_M sums to 1. `outcomes` are what the last axis stands for: labels or token ids, or empty
    where it is the whole vocabulary or the model's own classes. Entropies are in nats.
    """

    members_MBV: Tensor
    weight_M: Tensor
    outcomes: tuple[str, ...] | tuple[int, ...] = ()

    @cached_property
    def log_probabilities(self) -> Tensor:
        """log p, (B, ..., V): exact also where every member's probability is too small for a number."""
        return torch.logsumexp(self.members_MBV + self._column().log(), dim=0)

    @property
    def probabilities(self) -> Tensor:
        """p, (B, ..., V)."""
        return self.log_probabilities.exp()

    @property
    def best(self) -> list[str] | list[int]:
        """The likeliest outcome of each row: a label or token id, or its index where `outcomes` is empty.

        Rows of several positions follow each other.
        """
        indices = self.log_probabilities.argmax(dim=-1).flatten().tolist()
        return [self.outcomes[index] for index in indices] if self.outcomes else indices

    @property
    def entropy(self) -> Tensor:
        """(B, ...): the entropy of the average, all that is uncertain about the outcome."""
        return _entropy(self.probabilities)

    @property
    def member_entropy(self) -> Tensor:
        """(M, B, ...): the entropy of each member."""
        return _entropy(self.members_MBV.exp())

    @property
    def disagreement(self) -> Tensor:
        """(B, ...): the entropy of the average less the average entropy: mutual information of outcome and member.

        0 where all members say the same, at most the entropy of the weights.
        """
        average = (self.member_entropy * self._column().squeeze(-1)).sum(dim=0)
        return (self.entropy - average).clamp(min=0)

    def _column(self) -> Tensor:
        """The weights beside the members' axis."""
        weight_M = self.weight_M.to(self.members_MBV)
        return weight_M.view(-1, *[1] * (self.members_MBV.dim() - 1))


def _entropy(probabilities: Tensor) -> Tensor:
    each: Tensor = torch.special.entr(probabilities)
    return each.sum(dim=-1)
