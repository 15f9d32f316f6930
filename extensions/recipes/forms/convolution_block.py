"""The sum of experts of a convolution, or the whole block that MLoRE's authors released."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import LayerMismatch
from loraweave.extend.models import conv
from loraweave.extend.recipes import Args, ExpertShape, Site, SumOfExperts, Weigh
from loraweave.extend.training import seeded
from loraweave.extensions.recipes.recipes.mlore import Mlore, TaskLinear, image_tasks

MOMENTUM = 0.1


class ConvolutionBlock(SumOfExperts):
    """The sum of experts, or with `as_released` the whole released block around it.

    The block is y = V GELU(BN(o)) with z = U x and o = BN'(sum over mixed e of w_e E_e(z)) + p E_task(z) + W z + G z.
    E(z) = B (A z + c) + d. U and V are 1 x 1 convolutions with biases, BN and BN' batch norms, all of the row's task. W is
    the base's convolution with its bias, which stays, and beside which G learns; the released path of all tasks is their
    sum, and gives z no gradient. The gate looks at z. The code: YuqiYang213/MLoRE, `MOEBlock`.
    """

    def __init__(self, recipe: Mlore, site: Site, shape: ExpertShape) -> None:
        super().__init__(recipe, site, shape)
        self.is_update = not recipe.as_released
        self.seed, self.num_mixed, self.generic = recipe.seed, len(recipe.ranks), recipe.generic
        self.block: nn.ModuleDict | None = None
        if recipe.as_released:
            if not site.kernel:
                raise LayerMismatch(
                    f"layer {site.name!r} is linear, and the released block is of convolutions: leave it out of "
                    "target_modules, or as_released"
                )
            num_tasks, num_in = len(recipe.tasks), site.num_inputs // torch.Size(site.kernel).numel()
            self.block = nn.ModuleDict(
                {
                    "enter": TaskLinear(num_tasks, num_in, num_in),
                    "mixed_norm": _TaskBatchNorm(num_tasks, site.num_outputs),
                    "norm": _TaskBatchNorm(num_tasks, site.num_outputs),
                    "leave": TaskLinear(num_tasks, site.num_outputs, site.num_outputs),
                }
            )
            self.c_S = nn.Parameter(torch.zeros(sum(shape.ranks)))
            self.d_EO = nn.Parameter(torch.zeros(shape.num_experts, site.num_outputs))

    def gate_input(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the gate's input (B, positions, channels): for a convolution, the middle pixel of each kernel window."""
        return conv.middle(module, x, self.a_SI) if self.site.kernel else super().gate_input(module, x)

    @property
    def moved(self) -> list[nn.Parameter]:
        if self.block is None:
            return []
        return [part for name in ("mixed_norm", "norm") for part in self._part(name).moved]

    @torch.no_grad()
    def reset(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Draw the block as torch draws convolutions; the mixed experts' biases are 0, as the authors' code sets them."""
        super().reset(starts)
        if self.block is None:
            return
        generator = seeded(self.seed, self.site.name, "block")
        for name in ("enter", "leave"):
            self._part(name).reset(generator)
        rows = self.expert_rows()
        for expert in range(self.num_mixed + self.generic, self.shape.num_experts):
            bounds = self.site.num_inputs**-0.5, self.shape.ranks[expert] ** -0.5
            for bias, bound in zip((self.c_S[rows[expert]], self.d_EO[expert]), bounds, strict=True):
                bias.uniform_(-bound, bound, generator=generator)

    def forward(self, module: Any, args: Args, y: Tensor, weigh: Weigh) -> Tensor:
        """Return the block's output. Raises ScopeError for a call without a task for each image, and what the sum raises."""
        if self.block is None:
            return super().forward(module, args, y, weigh)
        running = self.current()
        assert running is not None
        x_BCT = args[0].flatten(2).to(self.a_SI.dtype)
        task_B = image_tasks(x_BCT.mT, running.call)
        z = self._part("enter")(x_BCT.mT, task_B).mT.reshape(args[0].shape)
        w_BE = weigh(conv.middle(module, z, self.a_SI))[:, 0]
        hidden_BTS = conv.project(module, z, self.a_SI) + self.c_S
        mixed_BTO = self._sum(hidden_BTS, w_BE, 0, self.num_mixed)
        own_BTO = self._sum(hidden_BTS, w_BE, self.num_mixed + self.generic, self.shape.num_experts)
        bias_O = None if module.bias is None else module.bias.to(z.dtype)
        shared_BTO = conv.rows(module, module._conv_forward(z.detach(), module.weight.to(z.dtype), bias_O))
        if self.generic:
            rows = self.expert_rows()[self.num_mixed]
            shared_BTO = shared_BTO + conv.project(module, z.detach(), self.a_SI[rows]) @ self.b_SO[rows]
        sum_BTO = self._part("mixed_norm")(mixed_BTO, task_B) + own_BTO + shared_BTO
        made_BTO = self._part("leave")(functional.gelu(self._part("norm")(sum_BTO, task_B)), task_B)
        return conv.put_back(made_BTO.to(y.dtype), y)

    def _sum(self, hidden_BTS: Tensor, w_BE: Tensor, first: int, last: int) -> Tensor:
        """Return the sum of w_e (hidden_e b_e + d_e) over experts `first` .. `last` - 1; `hidden_BTS` is A x + c."""
        expert_rows = self.expert_rows()
        rows, w_BE = slice(expert_rows[first].start, expert_rows[last - 1].stop), w_BE[:, first:last]
        w_B1S = w_BE[:, None, self.owner_S[rows] - first]
        return (hidden_BTS[..., rows] * w_B1S) @ self.b_SO[rows] + (w_BE @ self.d_EO[first:last])[:, None]

    def _part(self, name: str) -> Any:
        assert self.block is not None
        return self.block[name]


class _TaskBatchNorm(nn.Module):
    """A BatchNorm over rows and positions with the factor, bias and statistics of each row's task."""

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()
        self.weight_KO = nn.Parameter(torch.ones(num_tasks, num_features))
        self.bias_KO = nn.Parameter(torch.zeros(num_tasks, num_features))
        self.mean_KO = nn.Parameter(torch.zeros(num_tasks, num_features), requires_grad=False)
        self.variance_KO = nn.Parameter(torch.ones(num_tasks, num_features), requires_grad=False)

    @property
    def moved(self) -> list[nn.Parameter]:
        return [self.mean_KO, self.variance_KO]

    def forward(self, x_BTO: Tensor, task_B: Tensor) -> Tensor:
        found_BTO = torch.empty_like(x_BTO)
        # a block that the backward pass runs again was counted the first time
        momentum = MOMENTUM if torch._C._current_graph_task_id() == -1 else 0.0
        for task in sorted(set(task_B.tolist())):
            own_B = task_B == task
            statistics = self.mean_KO[task], self.variance_KO[task], self.weight_KO[task], self.bias_KO[task]
            normed_BOT = functional.batch_norm(x_BTO[own_B].mT, *statistics, self.training, momentum)
            found_BTO[own_B] = normed_BOT.mT
        return found_BTO
