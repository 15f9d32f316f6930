"""The experts' factors where the layers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.hub.adapter import Adapter


@dataclass(frozen=True, eq=False)
class PlacedFactors:
    """One expert's factors in one layer, on a device in a dtype; gain and bias in fp32 or better."""

    a_RI: Tensor
    b_RO: Tensor
    gain_O: Tensor | None
    bias_O: Tensor | None


class Residents:
    """Gives leases of experts; `adapter` is asked for each one's factors, bound to the base model.

    What is made for a device and dtype is kept for the next lease of the expert.
    """

    def __init__(self, adapter: Callable[[str], Adapter]) -> None:
        self._adapter = adapter
        self._placed: dict[str, dict[tuple[str, torch.device, torch.dtype], PlacedFactors]] = {}

    def lease(self, names: Sequence[str]) -> Lease:
        """The named experts, for as long as the lease is kept."""
        return Lease({name: self._adapter(name) for name in names}, self._placed)


class Lease:
    """Experts that stay at hand until `release`."""

    def __init__(
        self,
        adapters: dict[str, Adapter],
        placed: dict[str, dict[tuple[str, torch.device, torch.dtype], PlacedFactors]],
    ) -> None:
        self._adapters = adapters
        self._all_placed = placed
        self._placed = {name: placed.setdefault(name, {}) for name in adapters}

    def renew(self) -> Lease:
        """Another lease of the same experts, which this one's end does not end."""
        return Lease(dict(self._adapters), self._all_placed)

    def part(self, name: str, layer: str, device: torch.device, dtype: torch.dtype) -> PlacedFactors | None:
        """The expert's factors in a layer, there and in that dtype; None where it has none."""
        factors = self._adapters[name].layers.get(layer)
        if factors is None:
            return None
        key = layer, device, dtype
        part = self._placed[name].get(key)
        if part is None:
            exact = torch.promote_types(dtype, torch.float32)
            gain_O, bias_O = factors.gain_O, factors.bias_O
            part = self._placed[name][key] = PlacedFactors(
                factors.a_RI.to(device, dtype),
                factors.b_OR.T.to(device, dtype).contiguous(),
                None if gain_O is None else gain_O.to(device, exact),
                None if bias_O is None else bias_O.to(device, exact),
            )
        return part

    def release(self) -> None:
        """Gives the experts back."""
        self._adapters, self._placed = {}, {}
