"""RAMoLE (Zhao et al. 2024, arXiv 2406.16989): attention over any experts, including ones it was not trained with."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from loraweave import Adapter, BaseModelMismatch, ExpertPool, WeightingError
from loraweave.extend import Count, Rate
from loraweave.extend.routing import Members, without
from loraweave.extensions.routers.routers.adapter_fusion import OutputAttention

RANK = 8


class Ramole(OutputAttention):
    """A router with w = softmax over experts of (a x) . (b^T E_e(x)) / sqrt(rank), a and b a RouterLoRA of `rank` by layer.

    E_e(x) = b_e a_e x is what expert e adds, without its gain and bias. As in a LoRA, a is drawn uniformly within
    1 / sqrt(I) of 0 and b starts at 0, so that all experts weigh alike and a has no gradient in the first step. Weights of
    experts keep their ratios when others come or go: `for_pool` gives the same router for other experts, such as those that
    retrieval found for an input, and trained ones need not be among them.

    In train mode each row leaves out each expert of a layer with probability `dropout` (half of them, as published), but
    two stay, since one alone has nothing to learn from. Raises what `OutputRouter` raises.
    """

    per_expert: ClassVar[Mapping[str, str | None] | None] = {"cores_": "owners_", "bases_": "owners_"}
    silent_at_first: ClassVar[tuple[str, ...]] = ("queries_",)
    # ours: on the tasks of the example pool mixed, 30 steps bring the loss from 2.56 to 1.60, and to 2.02 at 1e-3
    lr: ClassVar[float] = 1e-2

    def __init__(self, pool: ExpertPool | Members, *, rank: Count = RANK, dropout: Rate = 0.5) -> None:
        super().__init__(pool, scale=1 / math.sqrt(rank))
        self.rank = rank
        self.dropout = dropout
        self._settle()

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return s_BTE of the layer's experts, -inf for the others and, in train mode, for those left out."""
        scores_BTE = super().scores(x_BTI, layer)
        if not self.training:
            return scores_BTE
        noise_BE = self._noise(scores_BTE, layer).to(scores_BTE.device)
        return _leaving_out(scores_BTE, noise_BE, self.members.layers[layer].experts, self.dropout)

    def for_pool(self, pool: ExpertPool) -> Self:
        """Return the same RouterLoRA for the experts of another pool of this base, without training.

        In layers that it has not been trained for, all experts weigh alike. Raises BaseModelMismatch for a pool of another
        base, WeightingError for one whose layers are all of this kind.
        """
        theirs = Members.of(pool)
        if why := self.members.base.differs(theirs.base):
            raise BaseModelMismatch(f"router 'ramole' was trained for another base model than the pool's: {why}")
        made = type(self)(pool, **self.options).train(self.training)
        known = [layer for layer in made.queries_ if layer in self.queries_]
        if not known:
            raise WeightingError(
                f"router 'ramole' was trained for {len(self.queries_)} layers, the first {next(iter(self.queries_))!r}, but "
                f"the pool updates {len(theirs.layers)} others, the first {next(iter(theirs.layers))!r}: fit() one for it"
            )
        for layer in known:
            made.queries_[layer] = self.queries_[layer].detach().clone()
            made.keys_[layer] = self.keys_[layer].detach().clone()
        return made.to(next(self.parameters()))

    def alone(self, pool: ExpertPool) -> Self:
        return self.for_pool(pool)

    def add_expert(self, name: str, adapter: Adapter) -> Self:
        """Return a router with one more expert at the end. Raises WeightingError for a taken name, else as `for_pool`."""
        return super().add_expert(name, adapter)._settle()

    def remove_expert(self, name: str) -> Self:
        """Return a router without one expert. Raises UnknownExpert for an unknown name, WeightingError for the last one."""
        return super().remove_expert(name)._settle()

    def _noise(self, scores_BTE: Tensor, layer: str) -> Tensor:
        """Draw u_BE, uniform in [0, 1); in training by each row's seed, however a step is split into passes."""
        num_rows, _, num_experts = scores_BTE.shape
        if self.step is None or len(self.step.seeds_B) != num_rows:
            return torch.rand(num_rows, num_experts, device=scores_BTE.device)
        place = self.layers.index(layer)
        draws = (torch.Generator().manual_seed(seed + place) for seed in self.step.seeds_B)
        return torch.stack([torch.rand(num_experts, generator=draw) for draw in draws])

    def _settle(self) -> Self:
        """Make a RouterLoRA for each layer that lacks one, drop those of other layers, and return self.

        A new one weighs all experts alike.
        """
        for layer in set(self.queries_) - set(self.informed):
            del self.queries_[layer], self.keys_[layer]
        for layer, routed in self.informed.items():
            if layer not in self.queries_:
                like, bound = self.cores_[layer], 1 / math.sqrt(routed.num_inputs)
                self.queries_[layer] = like.new_empty(self.rank, routed.num_inputs).uniform_(-bound, bound)
                self.keys_[layer] = like.new_zeros(self.rank, routed.num_outputs)
        return self


def _leaving_out(scores_BTE: Tensor, noise_BE: Tensor, present: Sequence[int], dropout: float) -> Tensor:
    """Return the scores with -inf, row by row, for each expert of `present` with probability `dropout`; two always stay."""
    noise_BE = without(noise_BE, present, filling=-1)
    out_BE = noise_BE < dropout
    out_BE.scatter_(1, noise_BE.topk(min(2, len(present)), dim=1).indices, False)
    return scores_BTE.masked_fill(out_BE[:, None], -math.inf)
