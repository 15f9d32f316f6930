"""The learner in the training of experts: a base model, and a recipe's experts and gates that run in its calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.routers.recipes._gate import Gate
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site


class ExpertLearner(nn.Module):
    """A model that is called like its base, with `task` for the tasks of the rows. `ExpertModel` is the implementation.

    The last call leaves `own_loss`, the base's loss of a call with labels, `terms`, the recipe's losses by name, and in
    training mode `notes`, what the gates did. `interrupted` has digests of the parameters that an interrupted training left,
    and began with; `report` is that of the last training.
    """

    base_model: nn.Module
    recipe: Recipe
    # the sites by their paths; experts and gates by keys
    sites: dict[str, Site]
    layers: nn.ModuleDict
    gates: nn.ModuleDict
    # of the first experts
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
        """The tasks that a row may belong to, in the order of the ids."""
        return self.recipe.tasks

    @property
    def shapes(self) -> dict[str, ExpertShape]:
        """The shapes of the experts of each site, by its path."""
        return {name: layer.shape for name, layer in self.named_layers().items()}

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of the experts of the site that has most."""
        most = max(shape.num_experts for shape in self.shapes.values())
        return (*self.names, *map(str, range(len(self.names), most)))

    def named_layers(self) -> dict[str, Any]:
        """Return the experts of each site, by its path."""
        return {name: self.layers[key_of(name)] for name in self.sites}

    def expert_state(self) -> dict[str, Tensor]:
        """Return the tensors of experts and gates, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("base_model.")}

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of experts and gates, by name."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("base_model.")}

    def learning(self) -> dict[str, nn.Parameter]:
        """Return the parameters that fit() trains, by name: experts, gates, and those of the base unfrozen by hand since."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def gate_of(self, site: Site) -> Gate | None:
        """Return the gate that weighs the experts of a site; None for weights of 1."""
        key = key_of(self.recipe.gate_key(site))
        if key not in self.gates:
            return None
        return self.gates[key]  # type: ignore[return-value]

    def moved(self) -> list[nn.Parameter]:
        """Return the parameters that fit() moves without a gradient."""
        gates = [gate for gate in self.gates.values() if isinstance(gate, Gate)]
        return [parameter for part in (*gates, *self.layers.values()) for parameter in part.moved]  # type: ignore[union-attr]

    def take_tasks(self, tasks: tuple[str, ...]) -> None:
        """Set the tasks of rows. Parts whose size depends on the number of tasks are rebuilt; others stay."""
        raise NotImplementedError


def key_of(path: str) -> str:
    """Return a site's or gate's key, without dots: torch takes a dot in a name for a step down."""
    return path.replace(".", "/")
