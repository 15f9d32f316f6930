"""Feed-forward blocks of models: how their layers are named, and the places of experts around the non-linearity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraweave import LayerMismatch
from loraweave.extend import Site, block_of, is_named, is_near, linear, numbered_blocks, require_all_named


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
        """Return the input of the last layer, before dropout, from the outputs of the first layers."""
        act: Callable[[Tensor], Tensor] = getattr(block, self.act)
        made = made[0].chunk(2, dim=-1) if self.halves else made
        return act(made[0]) if len(made) == 1 else act(made[0]) * made[1]

    def is_that_of(self, block: nn.Module) -> bool:
        """Return whether a block has linear layers of these names and no other parameters."""
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

    Raises UnknownName for a target that matches none, LayerMismatch, naming the module, for one that is no such block, or
    that does more than its layers.
    """
    blocks, sites = numbered_blocks(model), {}
    for name, module in model.named_modules():
        if not is_named(name, targets):
            continue
        refusal = f"{name!r} ({type(module).__name__}) gets no experts around its non-linearity"
        if (layout := layout_of(module)) is None:
            known = "; ".join(f"{', '.join(other.first)}, {other.act} and {other.down}" for other in LAYOUTS)
            raise LayerMismatch(
                f"{refusal}: it is no feed-forward block that has {known}, and no other parameters; name such blocks in "
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
    """Return whether block and layout agree on a random x; True if the block's weights are not plain floats."""
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
