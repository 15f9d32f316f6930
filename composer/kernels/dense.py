"""All distinct experts' factors side by side for every token, masked by the tokens' weights.

For weights that vary by token or learn, and for rows that share one small set of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.composer.kernels._parts import AddsInPlace, Part, rank_rows, repeated, stacked_a
from loraweave.composer.kernels.naive import mixed


@dataclass(frozen=True, eq=False)
class Stack:
    """Factors of several experts side by side, and the expert of each rank row; for any weights."""

    a_SI: Tensor
    b_SO: Tensor
    owner_S: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], dtype: torch.dtype) -> Stack:
        owner = [number for number, part in enumerate(parts) for _ in range(part.a_RI.shape[0])]
        b_SO = torch.cat([part.b_RO for part in parts]).to(dtype)
        return cls(stacked_a(parts, dtype), b_SO, torch.tensor(owner, device=b_SO.device))

    @property
    def num_bytes(self) -> int:
        return self.a_SI.nbytes + self.b_SO.nbytes

    def weighted(self, w_BTP: Tensor) -> Dense:
        """With the weights of the parts; B and T may be 1."""
        return Dense(self, w_BTP[..., self.owner_S])


@dataclass(frozen=True, eq=False)
class Dense(AddsInPlace):
    """A stack of factors and the weight of each rank row, in fp32 or better."""

    stack: Stack
    w_BTS: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.a_SI.dtype

    @property
    def num_bytes(self) -> int:
        return self.w_BTS.nbytes

    def expanded(self, hidden_BTS: Tensor) -> Tensor:
        """(hidden * w) b^T, for the hidden values of whatever layer."""
        return self._mixed(hidden_BTS).to(self.dtype) @ self.stack.b_SO

    def update(self, x_BTI: Tensor) -> Tensor:
        return self.expanded(linear(x_BTI, self.stack.a_SI))

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        b_SO = self.stack.b_SO
        mixed_BTS = self._mixed(linear(x_BTI, self.stack.a_SI))
        y_BTO.view(-1, b_SO.shape[1]).addmm_(mixed_BTS.view(-1, b_SO.shape[0]), b_SO)

    def _mixed(self, hidden_BTS: Tensor) -> Tensor:
        return mixed(hidden_BTS, repeated(self.w_BTS, hidden_BTS.shape[0]))


def dense(x_BTI: Tensor, a_SI: Tensor, b_OS: Tensor, w_BTS: Tensor) -> Tensor:
    """The same as `naive`."""
    if not a_SI.shape[0]:
        return x_BTI.new_zeros(*x_BTI.shape[:2], b_OS.shape[0])
    return Stack.of(rank_rows(a_SI, b_OS), x_BTI.dtype).weighted(w_BTS).update(x_BTI)
