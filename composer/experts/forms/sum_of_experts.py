"""Experts whose updates are added, weighted, to the output of a linear layer or a convolution."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.composer.experts.forms._form import Args, Form, Weigh, fitting
from loraweave.composer.experts.parts import layer_sites
from loraweave.composer.live.kernels.dense import RankRows, add_experts
from loraweave.composer.model.kinds import conv, linear
from loraweave.composer.model.layers import gives_new_memory
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.types import Factors


class SumOfExperts(Form):
    """The form y0 + scale * sum over e of w_e * gain_e * (dropout(x) a_e^T) b_e^T.

    The experts' factors are stacked by rank rows as a_SI and b_SO; a factor that all experts share is stored once. All
    experts of a site see the same dropout.
    """

    is_update = True
    # the tensors that `reset` sets
    of_starts: tuple[str, ...] = ("a_SI", "b_SO")
    owner_S: Tensor
    own_row_S: Tensor

    def __init__(self, recipe: Recipe, site: Site, shape: ExpertShape) -> None:
        super().__init__(recipe, site, shape)
        # experts whose weight can be other than 0 in a token; fewer if the gate skips some
        self.most = shape.num_experts
        num_ranks = sum(shape.ranks)
        self.a_SI = nn.Parameter(torch.zeros(max(shape.ranks) if shape.shared_a else num_ranks, site.num_inputs))
        self.b_SO = nn.Parameter(torch.zeros(max(shape.ranks) if shape.shared_b else num_ranks, site.num_outputs))
        self.gain_EO = nn.Parameter(torch.zeros(shape.num_experts, site.num_outputs)) if shape.gains else None
        owner_S = torch.arange(shape.num_experts).repeat_interleave(torch.tensor(shape.ranks), output_size=num_ranks)
        own_row_S = torch.cat([torch.arange(rank) for rank in shape.ranks])
        self.register_buffer("owner_S", owner_S, persistent=False)
        self.register_buffer("own_row_S", own_row_S, persistent=False)

    @staticmethod
    def sites(model: nn.Module, recipe: Recipe) -> list[Site]:
        return layer_sites(model, recipe.target_modules, kinds=(linear, conv))

    @torch.no_grad()
    def reset(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        own_a, own_b = zip(*starts, strict=True)
        longest = max(range(len(self.shape.ranks)), key=lambda expert: self.shape.ranks[expert])
        self.a_SI.copy_(own_a[longest] if self.shape.shared_a else torch.cat(own_a))
        self.b_SO.copy_(own_b[longest] if self.shape.shared_b else torch.cat(own_b))

    @torch.no_grad()
    def starts(self) -> list[tuple[Tensor, Tensor]]:
        """Return copies of each expert's factors (a_RI, b_RO), in the form that `reset` takes; gains are not included."""
        a, b = self.stacked()
        a_SI = a[self.own_row_S] if self.shape.shared_a else a
        b_SO = b[self.own_row_S] if self.shape.shared_b else b
        return [(a_SI[own_S].clone(), b_SO[own_S].clone()) for own_S in self.expert_rows()]

    def forward(self, module: nn.Module, args: Args, y: Tensor, weigh: Weigh) -> Tensor:
        """Return y plus the update. Raises ScopeError, naming layer and counts, for weights of other rows or tokens."""
        kind = conv if self.site.kernel else linear
        dtype = torch.get_autocast_dtype(y.device.type) if torch.is_autocast_enabled(y.device.type) else y.dtype
        x, y_BTO = args[0], kind.rows(module, y)
        w_BTE = fitting(weigh(self.gate_input(module, x)), self.site, *y_BTO.shape[:2])
        w_BTE = w_BTE * self.scale if self.scale != 1.0 else w_BTE
        x = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        a, b = self.stacked()[0].to(dtype), self._scaled_b().to(dtype)
        rows = RankRows(self.owner_S, *self._shared_rows())
        if kind is conv:
            hidden_BTR = conv.project(module, x.to(dtype), a)
            mixed_BTS = rows.of_a(hidden_BTR) * w_BTE.to(hidden_BTR.dtype)[..., self.owner_S]
            return y + conv.put_back(mixed_BTS @ rows.of_b(b), y).to(y.dtype)
        in_place = gives_new_memory(module) and y.is_contiguous() and not _others_saw(module)
        w_NE = w_BTE.reshape(1, -1) if w_BTE.numel() == w_BTE.shape[2] else w_BTE.expand(*y_BTO.shape[:2], -1).flatten(0, 1)
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        made = add_experts(y if in_place else None, x_NI, w_NE, a, b, rows, ranks=self.shape.ranks, most=self.most)
        return made if in_place else y + made.view(y.shape).to(y.dtype)

    @torch.no_grad()
    def factors(self, w_E: Tensor) -> Factors:
        rows = RankRows(self.owner_S, *self._shared_rows())
        w_S1, a = self.scale * w_E.to(self.b_SO)[self.owner_S][:, None], self.stacked()[0]
        a_SI = a if rows.a_row_S is None else a[rows.a_row_S]
        b_SO = self._scaled_b() if rows.b_row_S is None else self._scaled_b()[rows.b_row_S]
        used_S = (w_S1[:, 0] != 0).cpu()
        a_SI, b_OS = a_SI.float().cpu()[used_S], (w_S1 * b_SO).float().cpu()[used_S].T.contiguous()
        return Factors(a_SI, b_OS, kind="conv" if self.site.kernel else "linear", kernel=self.site.kernel)

    def gate_input(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the gate's input, (B, positions, I); for a convolution, all values under the kernel at each position."""
        return (conv if self.site.kernel else linear).inputs(module, x, self.a_SI)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return a and b, stacked by the rank rows of all experts; a factor that all experts share has one expert's rows."""
        return self.a_SI, self.b_SO

    def expert_rows(self) -> list[slice]:
        """Return the slice of rank rows of each expert."""
        ends = list(accumulate(self.shape.ranks))
        return [slice(end - rank, end) for end, rank in zip(ends, self.shape.ranks, strict=True)]

    def _shared_rows(self) -> tuple[Tensor | None, Tensor | None]:
        """Return (a_row_S, b_row_S), the row of a and of b that each rank row uses; None for its own, as b with gains."""
        b_row_S = self.own_row_S if self.shape.shared_b and self.gain_EO is None else None
        return self.own_row_S if self.shape.shared_a else None, b_row_S

    def _scaled_b(self) -> Tensor:
        """Return b, with each expert's outputs multiplied by its gains if there are any."""
        b = self.stacked()[1]
        if self.gain_EO is None:
            return b
        b_SO = b[self.own_row_S] if self.shape.shared_b else b
        return b_SO * self.gain_EO[self.owner_S]


def _others_saw(module: nn.Module) -> bool:
    """Return True if the module has forward hooks of others, which may keep the output that the experts would change."""
    return any(not type(hook).__module__.startswith("loraweave.") for hook in module._forward_hooks.values())
