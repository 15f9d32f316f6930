"""An adapter that is trained to first order: L-LoRA's partial linearisation (Tang et al. 2024, arXiv 2310.04742)."""

from __future__ import annotations

import torch

from loraweave.composer.training.lora_job import LoraJob, Pairs
from loraweave.composer.training.training_job import LowRank


class LinearizedJob(LoraJob):
    """A job in which each layer's update is the tangent at its beginning (a0, b0): s (b a0 + b0 (a - a0)) x.

    The base stays as nonlinear as it is; only the adapter is linearised, layer by layer, so that what jobs learn from a
    common beginning superposes exactly in each layer. Where b0 = 0 the update is s b a0, and a is not trained.
    """

    def __init__(self, name: str, factors: Pairs, scale: float) -> None:
        super().__init__(name, factors, scale)
        self.origin = {layer: (a.detach().clone(), b.detach().clone()) for layer, (a, b) in self.factors.items()}
        for layer, (a_RI, _) in self.factors.items():
            # nothing of a reaches the output where b0 is 0
            a_RI.requires_grad_(bool(self.origin[layer][1].any()))

    def low_rank(self, layer: str) -> LowRank:
        """s b over a0, and beside it s b0 over a - a0 where b0 is not 0, which doubles the rank."""
        a_RI, b_OR = self.factors[layer]
        a0_RI, b0_OR = self.origin[layer]
        if not a_RI.requires_grad:
            return LowRank(a0_RI, b_OR, self.scale)
        return LowRank(torch.cat([a0_RI, a_RI - a0_RI]), torch.cat([b_OR, b0_OR], dim=1), self.scale)
