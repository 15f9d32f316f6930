"""Experts around the non-linearity of a feed-forward block: each is the whole block with factors of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import LayerMismatch
from loraweave.extend.live import sort_by_expert
from loraweave.extend.models import by_row, is_near, linear
from loraweave.extend.recipes import (
    Args,
    ExpertShape,
    Form,
    Recipe,
    Seen,
    Site,
    Weigh,
    fitting,
    is_named,
    numbered_blocks,
    require_all_named,
)
from loraweave.extend.routing import block_of


@dataclass(frozen=True)
class Layout:
    """A layout of feed-forward blocks: the names that a block has for its layers, activation and dropout.

    The block is down(dropout(act(first x))), or down(dropout(act(first x) * second x)). With `halves` one layer gives the
    outputs of the first and of the second, one after the other.
    """

    first: tuple[str, ...]
    down: str
    act: str
    dropout: str | None = None
    halves: bool = False

    def between(self, block: nn.Module, made: Sequence[Tensor]) -> Tensor:
        """Return the input of the block's last layer, before dropout, from `made`, the outputs of its first layers."""
        act: Callable[[Tensor], Tensor] = getattr(block, self.act)
        made = made[0].chunk(2, dim=-1) if self.halves else made
        return act(made[0]) if len(made) == 1 else act(made[0]) * made[1]

    def is_that_of(self, block: nn.Module) -> bool:
        """Return True if a block has linear layers of these names, this activation and no other parameters."""
        parts = [getattr(block, name, None) for name in (*self.first, self.down)]
        if not all(isinstance(part, nn.Module) and linear.shape(part) is not None for part in parts):
            return False
        num_parameters = sum(1 for part in parts if part is not None for _ in part.parameters())
        return hasattr(block, self.act) and num_parameters == sum(1 for _ in block.parameters())


LAYOUTS = (
    Layout(("gate_proj", "up_proj"), "down_proj", "act_fn"),
    Layout(("gate_up_proj",), "down_proj", "activation_fn", halves=True),
    Layout(("wi_0", "wi_1"), "wo", "act", "dropout"),
    Layout(("wi",), "wo", "act", "dropout"),
    Layout(("c_fc",), "c_proj", "act"),
    Layout(("fc1",), "fc2", "activation_fn"),
)


def layout_of(block: nn.Module) -> Layout | None:
    """Return the layout of a feed-forward block; None for any other module."""
    return next((layout for layout in LAYOUTS if layout.is_that_of(block)), None)


def feed_forward_sites(model: nn.Module, targets: Sequence[str]) -> list[Site]:
    """Return the feed-forward blocks whose path ends in one of `targets`, in the model's order; their layers are the parts.

    Raises UnknownName for a target that matches none, LayerMismatch, naming the module, for a module that is not such a
    block, or that does more than its layers.
    """
    blocks, sites = numbered_blocks(model), {}
    for name, module in model.named_modules():
        if not is_named(name, targets):
            continue
        refusal = f"{name!r} ({type(module).__name__}) gets no experts around its non-linearity"
        if (layout := layout_of(module)) is None:
            known = "; ".join(f"{', '.join(other.first)}, {other.act} and {other.down}" for other in LAYOUTS)
            raise LayerMismatch(
                f"{refusal}: it is not a feed-forward block that has {known}, and no other parameters; name such blocks in "
                "target_modules, or take a recipe that adds its experts to single layers, such as mola"
            )
        place = (blocks.get(block_of(name)), len(blocks))
        parts = tuple(_part(f"{name}.{part}", module.get_submodule(part), place) for part in (*layout.first, layout.down))
        if not _does_what_it_says(module, layout):
            raise LayerMismatch(
                f"{refusal}: its forward is more than its layers and {layout.act}, which is all that an expert would have; "
                "leave it out of target_modules"
            )
        sites[name] = Site(name, parts[0].num_inputs, parts[-1].num_outputs, *place, parts=parts)
    require_all_named(targets, sites, [name for name, module in model.named_modules() if layout_of(module) is not None])
    return list(sites.values())


def _part(name: str, module: nn.Module, place: tuple[int | None, int]) -> Site:
    shape = linear.shape(module)
    assert shape is not None
    if why := linear.refusal(module):
        raise LayerMismatch(
            f"layer {name!r} ({type(module).__name__}) gets no experts: {why}; leave its block out of target_modules"
        )
    return Site(name, shape.num_inputs, shape.num_outputs, *place)


def _does_what_it_says(block: nn.Module, layout: Layout) -> bool:
    """Return True if block and layout compute the same for a random x, or if the block's weights are not plain floats."""
    weights = list(block.parameters())
    if any(weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2 for weight in weights):
        return True
    layers = [block.get_submodule(name) for name in layout.first]
    shape = linear.shape(layers[0])
    assert shape is not None
    x = torch.randn(1, 3, shape.num_inputs, generator=torch.Generator().manual_seed(0), device="cpu").to(weights[0])
    training = [module for module in block.modules() if module.training]
    block.eval()
    try:
        with torch.no_grad():
            between = layout.between(block, [layer(x) for layer in layers])
            # T5 keeps its last layer in fp32
            expected = block.get_submodule(layout.down)(between.to(weights[-1].dtype))
            y = block(x)
    finally:
        for module in training:
            module.training = True
    return is_near(y, expected, atol=1e-2 * float(expected.abs().max()))


class FeedForward(Form):
    """The form sum over e of w_e * FFN_e(x) + (1 - sum of w_e) * FFN(x), with FFN_e(x) = D_e(act(G_e x) * U_e x).

    G_e = G + scale * B_e A_e, and so U_e and D_e: the frozen layers are those of the block, and run once for all experts.
    Since D is linear, the sum is D h + scale * sum over e of w_e * B_e A_e h_e with h = h_0 + sum over e of w_e (h_e - h_0),
    where h_0 is what the block alone has before D. An expert sees only the tokens whose weight of it is not 0; such a weight
    has no gradient. All experts share one dropout of x; each has its own before D.
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
        """Return the mixed input h of the block's last layer D, and the experts' update of D h, both in the layer's shapes.

        `made` has the outputs of the first layers for x, `own` the frozen block's input of its last layer.
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
        """Draw the scaled dropout mask before the block's last layer, shaped as `like`; None if there is no dropout."""
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
        """Return the unscaled product (x a_e^T) b_e^T (N, O) of one expert."""
        start = sum(self.ranks[:expert])
        rows = slice(start, start + self.ranks[expert])
        return (x_NI @ self.a_SI[rows].to(x_NI.dtype).T) @ self.b_SO[rows].to(x_NI.dtype)
