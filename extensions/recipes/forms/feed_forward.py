"""Experts around the non-linearity of a feed-forward block: each is the whole block with factors of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.extend import Args, ExpertShape, Form, Recipe, Seen, Site, Weigh, by_row, fitting, sort_by_expert
from loraweave.extensions.recipes.blocks import LAYOUTS, feed_forward_sites


class FeedForward(Form):
    """sum over e of w_e * FFN_e(x) + (1 - sum of w_e) * FFN(x), with FFN_e(x) = D_e(act(G_e x) * U_e x).

    G_e = G + scale * B_e A_e, and so U_e and D_e: the frozen layers are those of the block, and run once for all experts.
    Since D is linear, the sum is D h + scale * sum over e of w_e * B_e A_e h_e with h = h_0 + sum over e of w_e (h_e - h_0),
    where h_0 is what the block alone has before D. An expert sees only the tokens whose weight of it is not 0; such a weight
    has no gradient. All experts see the same dropout of x, and each its own of what it has before D.
    """

    def __init__(self, recipe: Recipe, site: Site, shape: ExpertShape) -> None:
        super().__init__(recipe, site, shape)
        names = [part.name.rpartition(".")[2] for part in site.parts]
        self.layout = next(layout for layout in LAYOUTS if [*layout.first, layout.down] == names)
        self.parts = nn.ModuleDict({name: _Factors(part, shape.ranks) for name, part in zip(names, site.parts, strict=True)})

    @staticmethod
    def sites(model: nn.Module, recipe: Recipe) -> list[Site]:
        return feed_forward_sites(model, recipe.target_modules)

    @torch.no_grad()
    def reset(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        count = self.shape.num_experts
        for number, factors in enumerate(self._factors()):
            own_a, own_b = zip(*starts[number * count : (number + 1) * count], strict=True)
            factors.a_SI.copy_(torch.cat(own_a))
            factors.b_SO.copy_(torch.cat(own_b))

    def before(self, part: int, block: nn.Module, args: Args, weigh: Weigh, seen: Seen) -> Args:
        if part == 0:
            seen["x"] = args[0]
        if part + 1 < len(self.site.parts):
            return args
        made = [seen[layer.name] for layer in self.site.parts[:-1]]
        mixed, seen["update"] = self._mixed(block, seen["x"], made, args[0], weigh)
        return (mixed.to(args[0].dtype), *args[1:])

    def after(self, part: int, block: nn.Module, args: Args, y: Tensor, seen: Seen) -> Tensor:
        if part + 1 == len(self.site.parts):
            update: Tensor = seen["update"]
            return y + update.to(y.dtype)
        seen[self.site.parts[part].name] = y
        return y

    def _mixed(
        self, block: nn.Module, x: Tensor, made: Sequence[Tensor], own: Tensor, weigh: Weigh
    ) -> tuple[Tensor, Tensor]:
        """Return (h, the experts' update of D h), each in the shape of its layer's tensors.

        `made` has the outputs of the first layers for x, `own` the input that the block made of them for its last layer.
        """
        x_BTI = by_row(x)
        w_BTE = fitting(weigh(x_BTI), self.site, *x_BTI.shape[:2])
        w_NE = w_BTE.expand(*x_BTI.shape[:2], -1).flatten(0, 1)
        *first, down = self._factors()
        dtype, wide = made[0].dtype, torch.promote_types(made[0].dtype, w_NE.dtype)
        made = [y.reshape(-1, y.shape[-1]) for y in made]
        x_NI = functional.dropout(x.reshape(-1, x.shape[-1]), self.dropout, self.training).to(dtype)
        kept_NF = self._kept(block, made[0])
        h_NF = own.reshape(-1, own.shape[-1]) if kept_NF is None else self.layout.between(block, made) * kept_NF
        mixed_NF = h_NF.to(wide, copy=True)
        update_NO = mixed_NF.new_zeros(len(x_NI), self.site.num_outputs)
        for expert, rows in enumerate(torch.split(*sort_by_expert(w_NE.detach()))):
            if not len(rows):
                continue
            some = slice(None) if len(rows) == len(x_NI) else rows
            w_M1 = w_NE[some, expert, None]
            deltas = [self.scale * factors.product(expert, x_NI[some]) for factors in first]
            h_MF = self.layout.between(block, [y[some] + delta for y, delta in zip(made, deltas, strict=True)])
            h_MF = h_MF if kept_NF is None else h_MF * kept_NF[some]
            mixed_NF.index_add_(0, rows, (h_MF - h_NF[some]) * w_M1)
            h_MF = functional.dropout(h_MF, self.dropout, self.training)
            update_NO.index_add_(0, rows, down.product(expert, h_MF) * (self.scale * w_M1))
        return mixed_NF.view(own.shape), update_NO.view(*own.shape[:-1], -1)

    def _kept(self, block: nn.Module, like: Tensor) -> Tensor | None:
        """Return the mask of the block's dropout before its last layer, already scaled; None where it changes nothing."""
        dropout = None if self.layout.dropout is None else block.get_submodule(self.layout.dropout)
        if dropout is None or not dropout.training:
            return None
        kept: Tensor = dropout(torch.ones_like(like))
        return kept

    def _factors(self) -> list[_Factors]:
        return list(self.parts.values())  # type: ignore[arg-type]


class _Factors(nn.Module):
    """The factors of all experts at one layer."""

    def __init__(self, part: Site, ranks: Sequence[int]) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.a_SI = nn.Parameter(torch.zeros(sum(ranks), part.num_inputs))
        self.b_SO = nn.Parameter(torch.zeros(sum(ranks), part.num_outputs))

    def product(self, expert: int, x_NI: Tensor) -> Tensor:
        """Return (x a_e^T) b_e^T."""
        start = sum(self.ranks[:expert])
        rows = slice(start, start + self.ranks[expert])
        return (x_NI @ self.a_SI[rows].to(x_NI.dtype).T) @ self.b_SO[rows].to(x_NI.dtype)
