"""Adapters of what an expert model has learned, where that is an update of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from loraweave.errors import ScopeError, UnknownName
from loraweave.hub.adapter import Adapter
from loraweave.hub.fingerprint import fingerprint
from loraweave.hub.whole_number import is_whole
from loraweave.routers.gates.call import Call

if TYPE_CHECKING:
    from loraweave.composer.experts.expert_model import ExpertModel


def one_expert(model: ExpertModel, number: int) -> Adapter:
    """What `ExpertModel.expert` says."""
    _require_updates(model, f"expert {number}")
    layers = {
        name: layer.factors(torch.eye(layer.shape.num_experts)[number])
        for name, layer in model.named_layers()
        if is_whole(number, 0) and number < layer.shape.num_experts and layer.shape.ranks[number]
    }
    if not layers:
        most = max(layer.shape.num_experts for _, layer in model.named_layers())
        raise UnknownName(f"recipe {model.recipe.name!r} has no expert {number!r}; its experts are 0 to {most - 1}")
    return _adapter(model, f"{model.recipe.name}-{number}", layers, {"expert": number})


def whole_mixture(model: ExpertModel, task: str | int | None) -> Adapter:
    """What `ExpertModel.adapter` says."""
    _require_updates(model, "the mixture")
    if not all(gate.static for gate in model.gates.values()):
        raise ScopeError(
            f"the weights of recipe {model.recipe.name!r} depend on the input, so that no one adapter has them: export "
            "its experts one by one (expert(number)), or save_pretrained() the whole"
        )
    task_B = model.task_ids(task)
    if task_B is not None and len(task_B) != 1:
        raise ScopeError(f"one adapter is the mixture of one task, and {len(task_B)} are given: make one of each")
    call, layers = Call(task_B=task_B), {}
    with torch.no_grad():
        model.show_gates(call)
        for name, layer in model.named_layers():
            gate = model.gate_of(model.sites[name])
            w_E = torch.ones(layer.shape.num_experts) if gate is None else gate(None, call).w_BTE.flatten()
            layers[name] = layer.factors(w_E)
    named = model.recipe.name if task is None else f"{model.recipe.name}-{task}"
    return _adapter(model, named, layers, {} if task is None else {"task": str(task)})


def _require_updates(model: ExpertModel, what: str) -> None:
    if not all(layer.is_update for _, layer in model.named_layers()):
        raise ScopeError(
            f"{what} of recipe {model.recipe.name!r} is no update of layers, and no adapter: save_pretrained() the whole"
        )


def _adapter(model: ExpertModel, name: str, layers: Mapping[str, Any], card: Mapping[str, Any]) -> Adapter:
    recipe = {"method": "loraweave.experts", "recipe": model.recipe.name, **card}
    base = str(getattr(model.base_model, "name_or_path", ""))
    return Adapter(name, base, layers, fingerprint(model.base_model), {"recipe": recipe})
