"""The part of a mixture that is no product of factors: sum over e of w_e (gain_e * y0 + bias_e)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.composer.kernels._own_precision import own_precision
from loraweave.composer.kernels._parts import repeated
from loraweave.composer.paging.layout import PlacedFactors


@dataclass(frozen=True, eq=False)
class AffineTable:
    """The gains and biases of a layer's experts, zero for one that has none; in fp32 or better."""

    gain_EO: Tensor | None
    bias_EO: Tensor | None
    has_gain_E: Tensor

    @classmethod
    def of(cls, parts: Sequence[PlacedFactors | None]) -> AffineTable | None:
        """Of a layer's experts, None for one that leaves the layer alone; None where no expert has a gain or a bias."""
        gain_EO = _table([None if part is None else part.gain_O for part in parts])
        bias_EO = _table([None if part is None else part.bias_O for part in parts])
        present = gain_EO if gain_EO is not None else bias_EO
        if present is None:
            return None
        has_gain = [part is not None and part.gain_O is not None for part in parts]
        return cls(gain_EO, bias_EO, torch.tensor(has_gain, device=present.device))

    def weighted(self, w_BTE: Tensor) -> Affine:
        """The sums over the experts; B and T may be 1."""
        touched_BT1 = None
        if self.gain_EO is not None and not w_BTE.requires_grad:
            touched_BT1 = ((w_BTE != 0) & self.has_gain_E).any(dim=-1, keepdim=True)
        with own_precision(w_BTE.device):
            return Affine(
                None if self.gain_EO is None else w_BTE.to(self.gain_EO.dtype) @ self.gain_EO,
                None if self.bias_EO is None else w_BTE.to(self.bias_EO.dtype) @ self.bias_EO,
                touched_BT1,
            )


@dataclass(frozen=True, eq=False)
class Affine:
    """The mixed gain and bias of each row (and token, where weights vary by token), and where some expert's gain counts."""

    gain_BTO: Tensor | None
    bias_BTO: Tensor | None
    touched_BT1: Tensor | None

    def on(self, y_BTO: Tensor, base_bias_O: Tensor | None) -> Tensor:
        """What is to be added to the base layer's output y, in fp32 or better."""
        total = torch.zeros((), device=y_BTO.device)
        if self.gain_BTO is not None:
            y0_BTO = y_BTO.to(self.gain_BTO.dtype)
            y0_BTO = y0_BTO if base_bias_O is None else y0_BTO - base_bias_O.to(y0_BTO)
            total = repeated(self.gain_BTO, y_BTO.shape[0]) * y0_BTO
            if self.touched_BT1 is not None:
                # a row without a gain stays what it is also where the base has overflowed
                total = torch.where(repeated(self.touched_BT1, y_BTO.shape[0]), total, 0.0)
        if self.bias_BTO is not None:
            total = total + repeated(self.bias_BTO, y_BTO.shape[0])
        return total


def _table(rows: list[Tensor | None]) -> Tensor | None:
    present = next((row for row in rows if row is not None), None)
    if present is None:
        return None
    return torch.stack([torch.zeros_like(present) if row is None else row for row in rows])
