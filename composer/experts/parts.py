"""The experts and gates of a recipe for the sites of a model, made apart from it and held beside it by name."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import loraweave.registry as registry
from loraweave.common.checks import is_whole
from loraweave.common.descent import seeded
from loraweave.common.options import options_of, require_known
from loraweave.composer.experts.forms._form import place_like
from loraweave.composer.experts.running import input_embeddings
from loraweave.composer.model.kinds import LayerKind
from loraweave.errors import LayerMismatch, ScopeError, UnknownName
from loraweave.routers.recipes._gate import Gate
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.routers.tokens._call import block_of
from loraweave.routers.tokens._learned import UNKNOWN

# a_RI and b_RO of an expert
Start = tuple[Tensor, Tensor]
# {site: a start for each expert}; the recipe draws those that are None or missing at the end
Starts = Mapping[str, Sequence[Start | None]]
# the reader's key among the gates
READER = "reader"
# {a recipe's former name: its name now}
RENAMED = {"pfedlora": "local_and_shared"}


class ExpertParts(nn.Module):
    """The base and a recipe's experts and gates, by name: the saved and the trainable parts of an `ExpertModel`.

    Each call sets `own_loss`, the base's loss if it has labels, `terms`, the recipe's losses by name, and in training mode
    `notes`, the `Step` of the gates. `interrupted` has two digests of parameters: after an interrupted training, and before
    it began. `report` is that of the last training.
    """

    base_model: nn.Module
    recipe: Recipe
    # sites by path; modules of experts and gates by `key_of`
    sites: dict[str, Site]
    layers: nn.ModuleDict
    gates: nn.ModuleDict
    # the names of the first experts
    names: tuple[str, ...]
    own_loss: Tensor | None
    terms: dict[str, Tensor]
    notes: Any
    report: Mapping[str, Any] | None
    interrupted: tuple[str, str]

    @property
    def config(self) -> Any:
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that rows may have; a task's id is its index."""
        return self.recipe.tasks

    @property
    def shapes(self) -> dict[str, ExpertShape]:
        """The shapes of the experts of each site, by its path."""
        return {name: layer.shape for name, layer in self.named_layers().items()}

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of the experts at the site with the most experts."""
        most = max(shape.num_experts for shape in self.shapes.values())
        return (*self.names, *map(str, range(len(self.names), most)))

    def named_layers(self) -> dict[str, Any]:
        """Return {path of a site: the module of its experts}."""
        return {name: self.layers[key_of(name)] for name in self.sites}

    def expert_state(self) -> dict[str, Tensor]:
        """Return the tensors of experts and gates, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("base_model.")}

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of experts and gates, by name."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("base_model.")}

    def learning(self) -> dict[str, nn.Parameter]:
        """Return {name: parameter} of all that fit() trains: experts, gates, and parameters of the base unfrozen by hand."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def gate_of(self, site: Site) -> Gate | None:
        """Return the gate that weighs the experts of a site; None for weights of 1."""
        key = key_of(self.recipe.gate_key(site))
        if key not in self.gates:
            return None
        return self.gates[key]  # type: ignore[return-value]

    def moved(self) -> list[nn.Parameter]:
        """Return the parameters that fit() changes without a gradient."""
        gates = [gate for gate in self.gates.values() if isinstance(gate, Gate)]
        return [parameter for part in (*gates, *self.layers.values()) for parameter in part.moved]  # type: ignore[union-attr]


def key_of(path: str) -> str:
    """Return the key of a site or gate, its path with "/" for dots, which torch does not allow in module names."""
    return path.replace(".", "/")


class Parts(NamedTuple):
    """{path: site} of the sites with experts, and their expert modules (`layers`) and gates, {key_of(path): module}."""

    sites: dict[str, Site]
    layers: nn.ModuleDict
    gates: nn.ModuleDict


def make_parts(
    base_model: nn.Module, recipe: Recipe, shapes: Mapping[str, ExpertShape] | None = None, starts: Starts | None = None
) -> Parts:
    """Return the sites with their experts and gates at initial values, on the devices of the sites' modules.

    `shapes`, {site: ExpertShape}, replaces the recipe's shapes, and `starts`, {site: factors of its experts}, the recipe's
    first factors. Raises UnknownName if no layer gets experts, and what the recipe's form raises for a site.
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
    """Return {name: shape} of the tensors of experts with these `shapes`, and of their gates, without allocating memory."""
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
    """Return {path of a site: shape of its experts}, from `shapes` or else from the recipe."""
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
    """Return the initial (a_RI, b_RO) of each expert at a site or a part of one, from `starts` or else from the recipe."""
    site_starts: list[tuple[Tensor, Tensor] | None] = list(() if starts is None else starts.get(site.name, ()))
    site_starts += [None] * (shape.num_experts - len(site_starts))
    return [
        recipe.start(site, expert, rank, seeded(recipe.seed, site.name, expert)) if start is None else start
        for expert, (rank, start) in enumerate(zip(shape.ranks, site_starts, strict=True))
    ]


def layer_sites(model: nn.Module, targets: Sequence[str], *, kinds: Sequence[LayerKind]) -> list[Site]:
    """Return the layers of these kinds whose path ends in one of `targets`, in the model's order.

    Raises UnknownName for a target without a match, LayerMismatch, naming the layer, for a layer whose forward does more
    than apply its weight.
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
    """Return {path: index} of the model's blocks; an encoder's come before its decoder's."""
    blocks = dict.fromkeys(block for name, _ in model.named_modules() if (block := block_of(f"{name}.")) is not None)
    return {block: place for place, block in enumerate(blocks)}


def is_named(name: str, targets: Sequence[str]) -> bool:
    """Return True if a module path is one of `targets`, or ends in one."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def require_all_named(targets: Sequence[str], found: Collection[str], known: Sequence[str]) -> None:
    """Raise UnknownName for a target that no path in `found` ends in; the message lists the endings of `known`."""
    for target in targets:
        if not any(is_named(name, [target]) for name in found):
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in known})) or "none"
            raise UnknownName(f"no layer matches {target!r} of target_modules; the model has layers that end in {endings}")


def make_recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe of that name with these options; lists become tuples.

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


def places_of(recipe: Recipe, task: Any) -> list[int] | None:
    """Return the ids of `task`, a task's name or id or a list of one per row, as a list; None if `task` is None.

    Raises UnknownName for an unknown task, ScopeError for None if the recipe needs a task.
    """
    if task is None:
        if recipe.needs_tasks:
            known = ", ".join(map(repr, recipe.tasks))
            raise ScopeError(f"recipe {recipe.name!r} looks at the task of each row: give task=..., of {known}")
        return None
    names = task.tolist() if hasattr(task, "tolist") else task
    names = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if not names:
        raise ScopeError("task is empty: give the task of each row, one for all, or None")
    places = {task: place for place, task in enumerate(recipe.tasks)}
    row_places = []
    for name in names:
        if isinstance(name, str) and name in places:
            row_places.append(places[name])
        elif (name == UNKNOWN and not recipe.needs_tasks) or (is_whole(name, 0) and name < len(places)):
            row_places.append(int(name))
        else:
            known = ", ".join(map(repr, places)) or "none: pass tasks=(...) or fit() it on {task: rows}"
            raise UnknownName(
                f"recipe {recipe.name!r} has no task {name!r}{registry.nearest(str(name), places)}; it has {known}"
            )
    return row_places
