"""The experts and gates of a recipe for the sites of a model, apart from the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraweave import registry
from loraweave.composer.experts.forms._form import placed
from loraweave.composer.experts.running import input_embeddings
from loraweave.composer.training.seeding import seeded
from loraweave.errors import UnknownName
from loraweave.routers.experts._recipe import ExpertShape, Recipe, Site

# a_RI and b_RO of an expert
Start = tuple[Tensor, Tensor]
# of each expert of a site; the recipe's own where there is none, or no more
Starts = Mapping[str, Sequence[Start | None]]
# among the gates
READER = "reader"


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
    """Experts and gates with what they begin with, beside the modules that they are for.

    `shapes` are those of the sites instead of the recipe's own, and `starts` what the experts of sites begin with instead of
    the recipe's. Raises UnknownName where no layer gets experts, and what the recipe's form raises for a site.
    """
    form = registry.get("forms", recipe.form)
    sites, layers, gates = _sites(base_model, recipe, shapes), nn.ModuleDict(), nn.ModuleDict()
    for site, shape in sites.items():
        like = next(base_model.get_submodule(site.name).parameters())
        layer = form(recipe, site, shape)
        layer.reset([start for part in site.parts or (site,) for start in _starts(recipe, part, shape, starts)])
        layers[key_of(site.name)] = placed(layer, like)
        key = key_of(recipe.gate_key(site))
        if key not in gates and (gate := recipe.gate(site, shape.num_experts)) is not None:
            gate.reset(seeded(recipe.seed, "gate", key))
            gates[key] = placed(gate, like)
        if key in gates and gates[key].skips:
            layer.most = gates[key].most  # type: ignore[assignment]
    if (reader := recipe.reader()) is not None:
        reader.reset(seeded(recipe.seed, READER))
        gates[READER] = placed(reader, next(base_model.parameters()))
    return Parts({site.name: site for site in sites}, layers, gates)


def asked_tensors(base_model: nn.Module, recipe: Recipe, shapes: Mapping[str, ExpertShape]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of such experts and gates, for which no memory is taken."""
    form = registry.get("forms", recipe.form)
    layers, gates = nn.ModuleDict(), nn.ModuleDict()
    with torch.device("meta"):
        for site, shape in _sites(base_model, recipe, shapes).items():
            layers[key_of(site.name)] = form(recipe, site, shape)
            if (gate := recipe.gate(site, shape.num_experts)) is not None:
                gates[key_of(recipe.gate_key(site))] = gate
        if (reader := recipe.reader()) is not None:
            gates[READER] = reader
    state = nn.ModuleDict({"layers": layers, "gates": gates}).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def shapes_of(
    base_model: nn.Module, recipe: Recipe, shapes: Mapping[str, ExpertShape] | None = None
) -> dict[str, ExpertShape]:
    """The experts of each site, of the recipe's own or of the given shapes."""
    return {site.name: shape for site, shape in _sites(base_model, recipe, shapes).items()}


def key_of(path: str) -> str:
    """A site's or gate's key: torch takes a dot in a name for a step down."""
    return path.replace(".", "/")


def _sites(base_model: nn.Module, recipe: Recipe, shapes: Mapping[str, ExpertShape] | None) -> dict[Site, ExpertShape]:
    form: Any = registry.get("forms", recipe.form)
    num_features = 0 if (embeddings := input_embeddings(base_model)) is None else embeddings.weight.shape[1]
    found = [replace(site, num_features=num_features) for site in form.sites(base_model, recipe)]
    own = {site: recipe.shape(site) if shapes is None else shapes.get(site.name) for site in found}
    given = {site: shape for site, shape in own.items() if shape is not None}
    if not given:
        raise UnknownName(f"recipe {recipe.name!r} gives no layer of the model experts: widen target_modules")
    return given


def _starts(recipe: Recipe, site: Site, shape: ExpertShape, starts: Starts | None) -> Sequence[tuple[Tensor, Tensor]]:
    """What each expert begins with at a site, or at a part of one: the given, or the recipe's own."""
    found: list[tuple[Tensor, Tensor] | None] = list(() if starts is None else starts.get(site.name, ()))
    found += [None] * (shape.num_experts - len(found))
    return [
        recipe.start(site, expert, rank, seeded(recipe.seed, site.name, expert)) if given is None else given
        for expert, (rank, given) in enumerate(zip(shape.ranks, found, strict=True))
    ]
