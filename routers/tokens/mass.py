"""MASS (Crisostomi et al. 2025, arXiv 2504.05342): a text to the experts in whose subspace its features lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.common.options import Count, Fraction, Positive
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import LayerTensors, Members
from loraweave.routers.tokens._scores import parts, right_vectors, without
from loraweave.routers.tokens._sequence import BySequence, Decision

TEMPERATURE = 1.0
THRESHOLD = 0.2
MOST = 3


class Mass(BySequence):
    """w = 1 for the experts of the smallest residuals |x - V_e V_e^T x|, 0 for the others.

    V_e are the right singular vectors of b_e a_e, its `k` first (all). The residuals are averaged over the row's tokens so
    far (`decision` "sequence"), then standardised over the layer's experts: r_e. Of p = softmax(-r / `temperature`) the
    experts with p_e above `threshold` (0.2) are taken, at most `most` (3); where none is, the likeliest one. These numbers
    are the released code's.

    There, one layer decides for the whole network on the feature of a class token, by a pass before; here every layer
    decides on its own input, in one pass. There, the chosen updates are merged as `merge(method="tsv")` merges; here they
    are summed, which is the same where their singular vectors are orthogonal. An expert of more directions leaves less of
    any x; `k` makes them alike.
    """

    per_expert: ClassVar[Mapping[str, str | None] | None] = {"directions_": "owners_"}
    simplex: bool = False

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        k: Count | None = None,
        temperature: Positive = TEMPERATURE,
        threshold: Fraction = THRESHOLD,
        most: Count = MOST,
        decision: Decision = "sequence",
    ) -> None:
        super().__init__(pool)
        self.k, self.temperature, self.threshold, self.most = k, temperature, threshold, most
        self.follow(decision)
        # V^T of the experts below each other, and whose each row is
        self.directions_ = LayerTensors({})
        self.owners_ = LayerTensors({})
        if (given := Members.pool_of(pool)) is not None:
            for layer, routed in self.members.layers.items():
                rows, owners = [torch.zeros(0, routed.num_inputs)], []
                for place, a_RI, b_OR in parts(given, layer):
                    v_RI = right_vectors(a_RI, b_OR)[:k]
                    rows.append(v_RI.float())
                    owners += [place] * len(v_RI)
                self.directions_[layer] = torch.cat(rows)
                self.owners_[layer] = torch.tensor(owners, dtype=torch.long)

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """-|x - V_e V_e^T x|, -inf for experts that leave the layer alone."""
        v_SI, owner_S = self.directions_[layer], self.owners_[layer]
        x_BTI = x_BTI.to(v_SI.dtype)
        if v_SI.shape[1] != x_BTI.shape[2]:
            # a layer with trained biases alone does not say how many inputs it has
            v_SI = v_SI.new_zeros(0, x_BTI.shape[2])
        inside_BTS = (x_BTI @ v_SI.T).square()
        square_BT1 = x_BTI.square().sum(dim=-1, keepdim=True)
        left_BTE = square_BT1.expand(-1, -1, len(self.experts)).index_add(2, owner_S, inside_BTS, alpha=-1)
        # the root of 0 has no gradient, and rounding may go below
        residual_BTE = left_BTE.clamp_min(torch.finfo(left_BTE.dtype).tiny).sqrt()
        return without(-residual_BTE, self.members.layers[layer].experts)

    def summed(self, scores_BTE: Tensor) -> Tensor:
        return scores_BTE.masked_fill(scores_BTE == -torch.inf, 0.0)

    def decided(self, mean_BTE: Tensor, scores_BTE: Tensor, layer: str) -> Tensor:
        """1 for the experts that are taken; the others get 0."""
        present = self.members.layers[layer].experts
        mean_BTP = mean_BTE[..., list(present)]
        spread_BT1 = mean_BTP.var(dim=-1, keepdim=True).sqrt() if len(present) > 1 else 0.0
        standard_BTE = (mean_BTE - mean_BTP.mean(dim=-1, keepdim=True)) / (spread_BT1 + 1e-6)
        p_BTE = (without(standard_BTE, present) / self.temperature).softmax(dim=-1)
        best = p_BTE.topk(min(self.most, len(present)), dim=-1)
        taken_BTK = best.values > self.threshold
        taken_BTK[..., 0] = True
        return torch.zeros_like(p_BTE).scatter(-1, best.indices, taken_BTK.to(p_BTE.dtype))
