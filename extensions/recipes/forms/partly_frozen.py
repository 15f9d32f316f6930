"""The sum of experts, some of which do not learn."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loraweave.extend.recipes import ExpertShape, Site, SumOfExperts
from loraweave.extensions.recipes.row_gates import Frozen


class PartlyFrozen(SumOfExperts):
    """The form y0 + scale * sum over e of w_e * (dropout(x) a_e^T) b_e^T, without gradients for the recipe's `frozen`.

    Their factors are buffers, which no optimizer sees, so that they stay the same bits; a_SI and b_SO are the others'.
    """

    of_starts = ("a_SI", "b_SO", "frozen_a_SI", "frozen_b_SO")
    frozen_a_SI: Tensor
    frozen_b_SO: Tensor

    def __init__(self, recipe: Frozen, site: Site, shape: ExpertShape) -> None:
        assert not any((shape.shared_a, shape.shared_b, shape.gains))
        super().__init__(recipe, site, shape)
        self.is_frozen = tuple(expert in recipe.frozen for expert in range(shape.num_experts))
        num_frozen = sum(rank for rank, frozen in zip(shape.ranks, self.is_frozen, strict=True) if frozen)
        num_learned = sum(shape.ranks) - num_frozen
        self.a_SI = nn.Parameter(torch.zeros(num_learned, site.num_inputs))
        self.b_SO = nn.Parameter(torch.zeros(num_learned, site.num_outputs))
        self.register_buffer("frozen_a_SI", torch.zeros(num_frozen, site.num_inputs))
        self.register_buffer("frozen_b_SO", torch.zeros(num_frozen, site.num_outputs))

    @torch.no_grad()
    def reset(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        for expert, (a_RI, _) in zip(self._each(self.a_SI, self.frozen_a_SI), starts, strict=True):
            expert.copy_(a_RI)
        for expert, (_, b_RO) in zip(self._each(self.b_SO, self.frozen_b_SO), starts, strict=True):
            expert.copy_(b_RO)

    def stacked(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self._each(self.a_SI, self.frozen_a_SI)), torch.cat(self._each(self.b_SO, self.frozen_b_SO))

    def _each(self, learned: Tensor, frozen: Tensor) -> list[Tensor]:
        """Return each expert's rank rows, in order, from the learned or the frozen factors."""
        expert_rows, begins = [], [0, 0]
        for rank, is_frozen in zip(self.shape.ranks, self.is_frozen, strict=True):
            begin = begins[is_frozen]
            expert_rows.append((frozen if is_frozen else learned)[begin : begin + rank])
            begins[is_frozen] = begin + rank
        return expert_rows
