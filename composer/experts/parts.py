"""The experts and gates of a recipe for the sites of a model, apart from the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import loraweave.registry as registry
from loraweave.common.options import options_of, require_known
from loraweave.common.randomness import seeded
from loraweave.composer.experts.forms._form import place_like
from loraweave.composer.experts.running import input_embeddings
from loraweave.composer.model.kinds import LayerKind, is_near, linear
from loraweave.composer.train.learner import key_of
from loraweave.errors import LayerMismatch, UnknownName
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.routers.tokens._model import block_of

# a_RI and b_RO of an expert
Start = tuple[Tensor, Tensor]
# of each expert of a site; the recipe's own where there is none, or no more
Starts = Mapping[str, Sequence[Start | None]]
# among the gates
READER = "reader"
# what recipes are named now that had another name when they were saved
RENAMED = {"pfedlora": "local_and_shared"}


class Parts(NamedTuple):
    """The sites with experts by their names; their experts and gates, by keys."""

    sites: dict[str, Site]
    layers: nn.ModuleDict
    gates: nn.ModuleDict


def make_parts(
    base_model: nn.Module,
    recipe: Recipe,
    shapes: Mapping[str, ExpertShape] | None = None,
    starts: Starts | None = None,
) -> Parts:
    """Return experts and gates at their starts, on the devices of the modules that they are for.

    `shapes` are those of the sites instead of the recipe's own, and `starts` the first factors of the sites' experts instead
    of the recipe's. Raises UnknownName where no layer gets experts, and what the recipe's form raises for a site.
    """
    form = registry.get("forms", recipe.form)
    sites, layers, gates = _sites(base_model, recipe, shapes), nn.ModuleDict(), nn.ModuleDict()
    for site, shape in sites.items():
        like = next(base_model.get_submodule(site.name).parameters())
        layer = form(recipe, site, shape)
        layer.reset([start for part in site.parts or (site,) for start in _starts(recipe, part, shape, starts)])
        layers[key_of(site.name)] = place_like(layer, like)
        key = key_of(recipe.gate_key(site))
        if key not in gates and (gate := recipe.gate(site, shape.num_experts)) is not None:
            gate.reset(seeded(recipe.seed, "gate", key))
            gates[key] = place_like(gate, like)
        if key in gates and gates[key].skips:
            layer.most = gates[key].most  # type: ignore[assignment]
    if (reader := recipe.reader(tuple(sites))) is not None:
        reader.reset(seeded(recipe.seed, READER))
        gates[READER] = place_like(reader, next(base_model.parameters()))
    return Parts({site.name: site for site in sites}, layers, gates)


def asked_tensors(base_model: nn.Module, recipe: Recipe, shapes: Mapping[str, ExpertShape]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that such experts and gates have, without taking memory for them."""
    form = registry.get("forms", recipe.form)
    layers, gates = nn.ModuleDict(), nn.ModuleDict()
    with torch.device("meta"):
        sites = _sites(base_model, recipe, shapes)
        for site, shape in sites.items():
            layers[key_of(site.name)] = form(recipe, site, shape)
            if (gate := recipe.gate(site, shape.num_experts)) is not None:
                gates[key_of(recipe.gate_key(site))] = gate
        if (reader := recipe.reader(tuple(sites))) is not None:
            gates[READER] = reader
    state = nn.ModuleDict({"layers": layers, "gates": gates}).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def shapes_of(
    base_model: nn.Module, recipe: Recipe, shapes: Mapping[str, ExpertShape] | None = None
) -> dict[str, ExpertShape]:
    """Return the experts of each site, from `shapes` or else from the recipe."""
    return {site.name: shape for site, shape in _sites(base_model, recipe, shapes).items()}


def _sites(base_model: nn.Module, recipe: Recipe, shapes: Mapping[str, ExpertShape] | None) -> dict[Site, ExpertShape]:
    form: Any = registry.get("forms", recipe.form)
    num_features = 0 if (embeddings := input_embeddings(base_model)) is None else embeddings.weight.shape[1]
    sites = [replace(site, num_features=num_features) for site in form.sites(base_model, recipe)]
    optional_shapes = {site: recipe.shape(site) if shapes is None else shapes.get(site.name) for site in sites}
    expert_shapes = {site: shape for site, shape in optional_shapes.items() if shape is not None}
    if not expert_shapes:
        raise UnknownName(f"recipe {recipe.name!r} gives no layer of the model experts: widen target_modules")
    return expert_shapes


def _starts(recipe: Recipe, site: Site, shape: ExpertShape, starts: Starts | None) -> Sequence[tuple[Tensor, Tensor]]:
    """Return each expert's start at a site, or at a part of one: the given one, or the recipe's own."""
    site_starts: list[tuple[Tensor, Tensor] | None] = list(() if starts is None else starts.get(site.name, ()))
    site_starts += [None] * (shape.num_experts - len(site_starts))
    return [
        recipe.start(site, expert, rank, seeded(recipe.seed, site.name, expert)) if start is None else start
        for expert, (rank, start) in enumerate(zip(shape.ranks, site_starts, strict=True))
    ]


def layer_sites(model: nn.Module, targets: Sequence[str], *, kinds: Sequence[LayerKind]) -> list[Site]:
    """Return the layers of these kinds whose path ends in one of `targets`, in the model's order.

    Raises UnknownName for a target that matches none, LayerMismatch, naming the layer, for one that does more than its
    weight.
    """
    sites: dict[str, Site] = {}
    blocks = numbered_blocks(model)
    for name, module in model.named_modules():
        kind = next((kind for kind in kinds if kind.shape(module) is not None), None)
        shape = None if kind is None else kind.shape(module)
        if kind is None or shape is None or not is_named(name, targets):
            continue
        if why := kind.refusal(module):
            raise LayerMismatch(
                f"layer {name!r} ({type(module).__name__}) gets no experts: {why}; leave it out of target_modules"
            )
        block = blocks.get(block_of(name))
        sites[name] = Site(name, shape.num_inputs, shape.num_outputs, block, len(blocks), shape.kernel)
    require_all_named(
        targets, sites, [name for name, module in model.named_modules() if any(k.shape(module) for k in kinds)]
    )
    return list(sites.values())


def numbered_blocks(model: nn.Module) -> dict[str | None, int]:
    """Return the place of each block among the model's, by its path; an encoder's come before its decoder's."""
    blocks = dict.fromkeys(block for name, _ in model.named_modules() if (block := block_of(f"{name}.")) is not None)
    return {block: place for place, block in enumerate(blocks)}


def is_named(name: str, targets: Sequence[str]) -> bool:
    """Return whether a module path is one of `targets`, or ends in one."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def require_all_named(targets: Sequence[str], found: Collection[str], known: Sequence[str]) -> None:
    """Raise UnknownName, saying what there is, for a target that names no place."""
    for target in targets:
        if not any(is_named(name, [target]) for name in found):
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in known})) or "none"
            raise UnknownName(f"no layer matches {target!r} of target_modules; the model has layers that end in {endings}")


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
    """Return whether block and layout agree on a random x; True where the block's weights are no plain numbers."""
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


def recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe of that name with these options; lists are taken for tuples.

    Raises UnknownName for an unknown name, and for the former name of a recipe.
    """
    if name in RENAMED:
        raise UnknownName(
            f"the recipe that was {name!r} is named {RENAMED[name]!r} now, for what it is; the system of that name is a "
            f"strategy of federation: federate(..., strategy={name!r}) of loraweave's extension federated"
        )
    made_of: type[Recipe] = registry.get("experts", name)
    require_known(f"recipe {name!r}", options, options_of(made_of))
    option_values: dict[str, Any] = {
        option: tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value
        for option, value in options.items()
    }
    return made_of(**option_values)
