"""A gate that looks at a whole image, with a router for each task."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.errors import ScopeError
from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Gate, Weighing
from loraweave.routers.gates.selecting import top_k_of_softmax
from loraweave.routers.routing.choosing import top_k_softmax


class SpatialGate(Gate):
    """f = [mean over positions of U3 GELU(LN(U1 x)), U2 GELU(LN(mean over positions of x))], and (m, s, p) = V f.

    Of the mixed experts, those with the `top_k` highest m + s * noise count: softmax over these, or softmax over all if not
    `renormalised`. Noise is in training alone. The generic expert, where there is one, has 1; the one of the row's task p,
    and those of other tasks 0. They are in that order. All U, LN and V are the task's own; x_BTC are the channels at each
    position.
    """

    def __init__(
        self,
        num_channels: int,
        num_mixed: int,
        num_tasks: int,
        *,
        generic: bool,
        top_k: int,
        renormalised: bool,
    ) -> None:
        super().__init__(num_mixed + generic + num_tasks, most=top_k + generic + 1)
        self.num_mixed, self.num_tasks = num_mixed, num_tasks
        self.generic, self.top_k, self.renormalised = generic, top_k, renormalised
        # of fewer than 4 values, LayerNorm leaves next to nothing
        width = max(4, num_channels // 4)
        self.u1, self.norm1 = _Linear(num_tasks, num_channels, width), _Norm(num_tasks, width)
        self.u3 = _Linear(num_tasks, width, width)
        self.norm2, self.u2 = _Norm(num_tasks, num_channels), _Linear(num_tasks, num_channels, width)
        self.v = _Linear(num_tasks, 2 * width, 2 * num_mixed + 1)

    def reset(self, generator: torch.Generator) -> None:
        """Each U, V and their biases uniform between -1/sqrt(I) and 1/sqrt(I), as torch draws a linear layer."""
        for part in self.children():
            if isinstance(part, _Linear):
                part.reset(generator)

    def forward(self, x_BTC: Tensor, call: Call) -> Weighing:
        """Raises ScopeError for a layer that sees parts of images, for texts, and for a call whose tasks are not known."""
        task_B = self._tasks(x_BTC, call)
        x_BTC = x_BTC.to(self.v.weight_KOI.dtype)
        each_B1H = self.u3(functional.gelu(self.norm1(self.u1(x_BTC, task_B), task_B)), task_B).mean(dim=1, keepdim=True)
        mean_B1H = self.u2(functional.gelu(self.norm2(x_BTC.mean(dim=1, keepdim=True), task_B)), task_B)
        made_B1V = self.v(torch.cat([each_B1H, mean_B1H], dim=-1), task_B)
        scores_B1E, spread_B1E, p_B11 = made_B1V.split([self.num_mixed, self.num_mixed, 1], dim=-1)
        if self.training:
            scores_B1E = scores_B1E + spread_B1E * torch.randn_like(spread_B1E)
        choose = top_k_softmax if self.renormalised else top_k_of_softmax
        ones_B1G = torch.ones_like(p_B11).expand(-1, -1, int(self.generic))
        own_B1K = functional.one_hot(task_B, self.num_tasks).to(p_B11)[:, None] * p_B11
        return Weighing(torch.cat([choose(scores_B1E, self.top_k), ones_B1G, own_B1K], dim=-1), scores_B1E)

    def _tasks(self, x_BTC: Tensor, call: Call) -> Tensor:
        if call.ids_BT is not None or call.follows:
            raise ScopeError(
                "the gate looks at all positions of an image at once: for texts, take a recipe with another gate"
            )
        if call.task_B is None:
            raise ScopeError(
                "the gate looks at the task of each row, and this call has none: give task=..., one for each row"
            )
        if len(call.task_B) != len(x_BTC):
            raise ScopeError(
                f"the gate looks at whole images, {len(call.task_B)} in this call, but its layer sees {len(x_BTC)} parts of "
                "them: leave layers that see windows out of target_modules"
            )
        return call.task_B


class _Linear(nn.Module):
    """x W^T + bias with the W and bias of each row's task."""

    def __init__(self, num_tasks: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight_KOI = nn.Parameter(torch.empty(num_tasks, num_outputs, num_inputs))
        self.bias_KO = nn.Parameter(torch.empty(num_tasks, num_outputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.weight_KOI.shape[2])
        self.weight_KOI.uniform_(-bound, bound, generator=generator)
        self.bias_KO.uniform_(-bound, bound, generator=generator)

    def forward(self, x_BTI: Tensor, task_B: Tensor) -> Tensor:
        return x_BTI @ self.weight_KOI[task_B].mT + self.bias_KO[task_B][:, None]


class _Norm(nn.Module):
    """LayerNorm with the factor and bias of each row's task."""

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()
        self.weight_KI = nn.Parameter(torch.ones(num_tasks, num_features))
        self.bias_KI = nn.Parameter(torch.zeros(num_tasks, num_features))

    def forward(self, x_BTI: Tensor, task_B: Tensor) -> Tensor:
        normed_BTI = functional.layer_norm(x_BTI, x_BTI.shape[-1:])
        return normed_BTI * self.weight_KI[task_B][:, None] + self.bias_KI[task_B][:, None]
