"""Several LoRA training jobs on one frozen base: equal row ranges of a batch belong to different adapters.

The base runs once for all jobs; each target layer adds two batched products over the jobs' stacked factors. A job's
gradients are those of training it alone, because no row of one job reaches the factors of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.composer.training.seeding import seeded
from loraweave.types import Factors


class FusedJobs:
    """Trainable factors of J jobs: per layer a_JRI (uniform in +-1/sqrt(I), as PEFT's default) and b_JOR (zero).

    `layers` gives each target layer's (O, I). A job in `start` begins as those factors instead, with their layers and ranks:
    to the bit where `alpha / rank` is a power of two, else to rounding. Where jobs differ in layers or rank, R is the
    largest and the others are filled up with zeros, which have no gradient and so stay zeros. With `common`, all other jobs
    begin with the same a.

    A context manager: inside it the model's target layers add each job's update to that job's row range. The batch has J
    equal row ranges, in the order of the jobs. Leaving removes every hook, also after an exception.
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
        common: bool = False,
    ) -> None:
        self.model = model
        self.jobs = tuple(jobs)
        self.scale = alpha / rank
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []
        device = next(model.parameters()).device
        given = start or {}
        begins = {
            job: self._given(given[job]) if job in given else _new("" if common else job, layers, rank, seed) for job in jobs
        }
        self.ranks = {job: {layer: len(a_RI) for layer, (a_RI, _) in found.items()} for job, found in begins.items()}
        for layer in dict.fromkeys(layer for found in begins.values() for layer in found):
            parts = [begins[job].get(layer) for job in jobs]
            self.factors[layer] = tuple(tensor.to(device).requires_grad_() for tensor in _stacked(parts))  # type: ignore[assignment]

    def _given(self, start: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
        return {layer: (part.a_RI.float().cpu(), part.b_OR.float().cpu() / self.scale) for layer, part in start.items()}

    def parameters(self) -> list[Tensor]:
        """The factors that are trained."""
        return [tensor for pair in self.factors.values() for tensor in pair if tensor.requires_grad]

    def freeze_a(self) -> None:
        """From now on b alone is trained."""
        for a_JRI, _ in self.factors.values():
            a_JRI.requires_grad_(False)

    def __enter__(self) -> FusedJobs:
        try:
            for layer in self.factors:
                module = self.model.get_submodule(layer)
                self._handles.append(module.register_forward_hook(self._hook(layer)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, layer: str) -> Any:
        def add_update(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x_JNI = args[0].reshape(len(self.jobs), -1, args[0].shape[-1])
            return output + torch.stack(self.update(layer, x_JNI)).view_as(output)

        return add_update

    def update(self, layer: str, x_JNI: Tensor) -> list[Tensor]:
        """update_NO of each job for its rows of the layer's input."""
        a_JRI, b_JOR = self.factors[layer]
        return self._products(x_JNI, a_JRI, b_JOR)

    def _products(self, x_JNI: Tensor, a_JRI: Tensor, b_JOR: Tensor) -> list[Tensor]:
        a_JRI, b_JOR = a_JRI.to(x_JNI.dtype), (self.scale * b_JOR).to(x_JNI.dtype)
        # a product for each job: the batched product copies its transposed operand, which costs 10 times more in bf16
        return [functional.linear(functional.linear(x, a), b) for x, a, b in zip(x_JNI, a_JRI, b_JOR, strict=True)]

    def gradient_norms(self) -> Tensor:
        """norm_J: each job's own gradient norm over all its factors."""
        squares = [p.grad.flatten(1).square().sum(dim=1) for p in self.parameters() if p.grad is not None]
        return torch.stack(squares).sum(dim=0).sqrt()

    def clip(self, limit: float) -> None:
        """Scales each job's gradient down to at most `limit`, independently of the others."""
        ratio_J = (limit / (self.gradient_norms() + 1e-6)).clamp(max=1.0)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(ratio_J[:, None, None])

    def layers_of(self, job: str) -> dict[str, Factors]:
        """One job's factors with the scale folded into b, detached copies on the CPU."""
        index = self.jobs.index(job)
        found = {}
        for layer, rank in self.ranks[job].items():
            a_RI, b_OR = (tensor[index].detach().cpu() for tensor in self.factors[layer])
            found[layer] = Factors(a_RI[:rank].clone(), b_OR[:, :rank] * self.scale)
        return found


def _stacked(parts: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """(a_JRI, b_JOR) at the largest rank, zeros beyond a job's own; None is a job that leaves the layer alone."""
    present = [part for part in parts if part is not None]
    rank = max(len(a_RI) for a_RI, _ in present)
    a_JRI = torch.zeros(len(parts), rank, present[0][0].shape[1])
    b_JOR = torch.zeros(len(parts), present[0][1].shape[0], rank)
    for index, part in enumerate(parts):
        if part is not None:
            a_JRI[index, : len(part[0])], b_JOR[index, :, : len(part[0])] = part
    return a_JRI, b_JOR


def _new(job: str, layers: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        layer: (_initial(seed, job, layer, rank, num_inputs), torch.zeros(num_outputs, rank))
        for layer, (num_outputs, num_inputs) in layers.items()
    }


def _initial(seed: int, job: str, layer: str, rank: int, num_inputs: int) -> Tensor:
    # seeded by names, so that a job starts the same whatever jobs share its batch
    bound = float(num_inputs**-0.5)
    return bound * torch.rand(rank, num_inputs, generator=seeded(seed, job, layer)).mul(2).sub(1)
