"""A fixed set of LoRAs that are trained together, as many rows of a batch for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraweave.composer.training.fused_pass import FusedPass
from loraweave.composer.training.linearized_job import LinearizedJob
from loraweave.composer.training.lora_job import LoraJob, given_factors, new_factors
from loraweave.types import Factors


class FusedJobs(FusedPass):
    """The pass of jobs with these names, each with new factors for `layers`, which gives each target layer's (O, I).

    A job in `start` begins as those factors instead, with their layers and ranks: to the bit where `alpha / rank` is a power
    of two, else to rounding.
    """

    members: tuple[LoraJob, ...]

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
        linearized: bool = False,
    ) -> None:
        device = next(model.parameters()).device
        given = start or {}
        super().__init__(
            model,
            [
                lora_job(
                    name, layers, given.get(name), rank=rank, alpha=alpha, seed=seed, device=device, linearized=linearized
                )
                for name in jobs
            ],
        )
        self.jobs = tuple(jobs)

    def parameters(self) -> list[Tensor]:
        """What is trained of all jobs."""
        return [tensor for job in self.members for tensor in job.parameters()]

    def freeze_a(self) -> None:
        """From now on b alone is trained."""
        for job in self.members:
            job.freeze_a()

    def layers_of(self, name: str) -> dict[str, Factors]:
        """One job's update, detached copies on the CPU."""
        return self.members[self.jobs.index(name)].result()


def lora_job(
    name: str,
    layers: Mapping[str, tuple[int, int]],
    start: Mapping[str, Factors] | None,
    *,
    rank: int,
    alpha: float,
    seed: int,
    device: torch.device,
    linearized: bool = False,
) -> LoraJob:
    """A job with new factors, or with those of `start`. Linearised jobs all begin with the same new a."""
    scale = alpha / rank
    if start is None:
        pairs = new_factors("" if linearized else name, layers, rank=rank, seed=seed, device=device)
    else:
        pairs = given_factors(start, scale=scale, device=device)
    return (LinearizedJob if linearized else LoraJob)(name, pairs, scale)
