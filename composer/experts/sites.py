"""The layers of a model that a recipe's target modules name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from loraweave.composer.layer_kinds._kind import LayerKind
from loraweave.errors import LayerMismatch, UnknownName
from loraweave.routers.experts._recipe import Site
from loraweave.routers.routing.blocks import block_of


def layer_sites(model: nn.Module, targets: Sequence[str], *, kinds: Sequence[LayerKind]) -> list[Site]:
    """The layers of these kinds whose path ends in one of `targets`, in the model's order.

    Raises UnknownName for a target that matches none, LayerMismatch, naming the layer, for one that does more than its
    weight.
    """
    found: dict[str, Site] = {}
    blocks, closing = numbered_blocks(model), closing_blocks(model)
    for name, module in model.named_modules():
        kind = next((kind for kind in kinds if kind.shape(module) is not None), None)
        shape = None if kind is None else kind.shape(module)
        if kind is None or shape is None or not is_named(name, targets):
            continue
        if why := kind.refusal(module):
            raise LayerMismatch(
                f"layer {name!r} ({type(module).__name__}) gets no experts: {why}; leave it out of target_modules"
            )
        block = block_of(name)
        found[name] = Site(
            name,
            shape.num_inputs,
            shape.num_outputs,
            blocks.get(block),
            len(blocks),
            shape.kernel,
            closing=block is None or any(name.startswith(f"{last}.") for last in closing),
        )
    require_all_named(
        targets, found, [name for name, module in model.named_modules() if any(k.shape(module) for k in kinds)]
    )
    return list(found.values())


def numbered_blocks(model: nn.Module) -> dict[str | None, int]:
    """The place of each block among the model's, by its path; an encoder's come before its decoder's."""
    blocks = dict.fromkeys(block for name, _ in model.named_modules() if (block := block_of(f"{name}.")) is not None)
    return {block: place for place, block in enumerate(blocks)}


def closing_blocks(model: nn.Module) -> list[str]:
    """The paths of the last block of each stage, or of each stack of blocks in a model without stages.

    A numbered module is a stage where it has a list of blocks of one class, as those of Swin, SegFormer and ResNet.
    """
    found: list[str] = []
    stacks: dict[str, str] = {}
    for block in numbered_blocks(model):
        assert block is not None
        module = model.get_submodule(block)
        stages = [(block, module), *((f"{block}.{part}", child) for part, child in module.named_children())]
        lists = [(path, list(each)) for path, each in stages if isinstance(each, nn.ModuleList | nn.Sequential)]
        alike = [(path, each) for path, each in lists if len({type(inner) for inner in each}) == 1]
        found += [f"{path}.{len(each) - 1}" for path, each in alike]
        if not alike:
            stacks[block.rpartition(".")[0]] = block
    return found or list(stacks.values())


def is_named(name: str, targets: Sequence[str]) -> bool:
    """Whether a module path is one of `targets`, or ends in one."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def require_all_named(targets: Sequence[str], found: Collection[str], known: Sequence[str]) -> None:
    """Raises UnknownName, saying what there is, for a target that names no place."""
    for target in targets:
        if not any(is_named(name, [target]) for name in found):
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in known})) or "none"
            raise UnknownName(f"no layer matches {target!r} of target_modules; the model has layers that end in {endings}")
