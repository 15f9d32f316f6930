"""One LoRA that is being trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.composer.batches import EncodedRow
from loraweave.composer.training.seeding import seeded
from loraweave.composer.training.training_job import LowRank
from loraweave.types import Factors

Pairs = Mapping[str, tuple[Tensor, Tensor]]


class LoraJob:
    """Trainable factors {layer: (a_RI, b_OR)} in fp32; the update of a layer is `scale` times their product."""

    def __init__(self, name: str, factors: Pairs, scale: float) -> None:
        self.name = name
        self.scale = scale
        # by rank row in memory, as the products of the gradient give it
        laid = {layer: (a_RI, b_OR.T.contiguous().T) for layer, (a_RI, b_OR) in factors.items()}
        self.factors = {layer: (a_RI.requires_grad_(), b_OR.requires_grad_()) for layer, (a_RI, b_OR) in laid.items()}

    @property
    def layers(self) -> Collection[str]:
        return self.factors.keys()

    def parameters(self) -> list[Tensor]:
        """The factors that are trained."""
        return [tensor for pair in self.factors.values() for tensor in pair if tensor.requires_grad]

    def freeze_a(self) -> None:
        """From now on b alone is trained."""
        for a_RI, _ in self.factors.values():
            a_RI.requires_grad_(False)

    def take(self, rows: Sequence[EncodedRow], step: int | None) -> None:
        """Nothing, like `begin`."""

    def begin(self, inputs: Mapping[str, Any], prompt_BT: Tensor | None) -> None:
        """Nothing: factors are the same for all rows."""

    def low_rank(self, layer: str) -> LowRank:
        return LowRank(*self.factors[layer], self.scale)

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        """In the dtype of x."""
        a_RI, b_OR, scale = self.low_rank(layer)
        return functional.linear(functional.linear(x_BTI, a_RI.to(x_BTI.dtype)), (scale * b_OR).to(x_BTI.dtype))

    def penalty(self) -> None:
        """Nothing."""

    def result(self) -> dict[str, Factors]:
        """The update as factors with the scale folded into b, detached copies on the CPU."""
        products = {layer: self.low_rank(layer) for layer in self.layers}
        return {
            layer: Factors(a_RI.detach().cpu().clone(), (b_OR.detach().cpu() * scale).contiguous())
            for layer, (a_RI, b_OR, scale) in products.items()
        }


def new_factors(
    name: str, layers: Mapping[str, tuple[int, int]], *, rank: int, seed: int, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """For layers of (O, I): a uniform in +-1/sqrt(I), as PEFT's default, a function of seed, name and layer; b zero."""
    return {
        layer: (_initial(seed, name, layer, rank, num_inputs).to(device), torch.zeros(num_outputs, rank, device=device))
        for layer, (num_outputs, num_inputs) in layers.items()
    }


def given_factors(start: Mapping[str, Factors], *, scale: float, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of an adapter's factors with the scale taken out of b: exact where it is a power of two, else rounded."""
    return {
        layer: (part.a_RI.to(device, torch.float32, copy=True), part.b_OR.to(device, torch.float32) / scale)
        for layer, part in start.items()
    }


def _initial(seed: int, name: str, layer: str, rank: int, num_inputs: int) -> Tensor:
    # seeded by names, so that a job starts the same whatever jobs share its batch
    bound = float(num_inputs**-0.5)
    return bound * torch.rand(rank, num_inputs, generator=seeded(seed, name, layer)).mul(2).sub(1)
