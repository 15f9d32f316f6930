"""Jobs whose adapters are trained to first order: L-LoRA's partial linearisation (Tang et al. 2024, arXiv 2310.04742)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraweave.composer.training.fused_jobs import FusedJobs
from loraweave.types import Factors


class LinearizedJobs(FusedJobs):
    """Jobs in which each layer's update is the tangent at its beginning (a0, b0): s (b a0 + b0 (a - a0)) x.

    The base stays as nonlinear as it is; only the adapters are linearised, layer by layer, so that what jobs learn from a
    common beginning superposes exactly in each layer. All jobs that are not in `start` begin with the same a0 and with
    b0 = 0: the update is then s b a0, and a is not trained.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[int, int]],
        jobs: Sequence[str],
        *,
        rank: int,
        alpha: float,
        seed: int,
        start: Mapping[str, Mapping[str, Factors]] | None = None,
    ) -> None:
        super().__init__(model, layers, jobs, rank=rank, alpha=alpha, seed=seed, start=start, common=True)
        self.origin = {layer: (a.detach().clone(), b.detach().clone()) for layer, (a, b) in self.factors.items()}
        for layer, (a_JRI, _) in self.factors.items():
            # nothing of a reaches the output where b0 is 0
            a_JRI.requires_grad_(bool(self.origin[layer][1].any()))

    def update(self, layer: str, x_JNI: Tensor) -> list[Tensor]:
        a_JRI, b_JOR = self.factors[layer]
        a0_JRI, b0_JOR = self.origin[layer]
        found = self._products(x_JNI, a0_JRI, b_JOR)
        if not a_JRI.requires_grad:
            return found
        moved = self._products(x_JNI, a_JRI - a0_JRI, b0_JOR)
        return [first + second for first, second in zip(found, moved, strict=True)]

    def layers_of(self, job: str) -> dict[str, Factors]:
        """One job's update: s b over a0, and beside it s b0 over a - a0 where b0 is not 0, which doubles the rank."""
        index, found = self.jobs.index(job), {}
        for layer, rank in self.ranks[job].items():
            a_RI, b_OR = (tensor[index].detach().cpu() for tensor in self.factors[layer])
            a0_RI, b0_OR = (tensor[index].cpu() for tensor in self.origin[layer])
            a_RI, b_OR, a0_RI, b0_OR = a_RI[:rank], b_OR[:, :rank] * self.scale, a0_RI[:rank], b0_OR[:, :rank] * self.scale
            if bool(b0_OR.any()):
                found[layer] = Factors(torch.cat([a0_RI, a_RI - a0_RI]), torch.cat([b_OR, b0_OR], dim=1))
            else:
                found[layer] = Factors(a0_RI.clone(), b_OR)
        return found
