"""The exchange of single experts between an expert model and adapters."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loraweave.common.checks import is_whole
from loraweave.composer.experts.expert_model import ExpertModel, require_expert_model
from loraweave.composer.experts.forms.sum_of_experts import SumOfExperts
from loraweave.composer.experts.parts import Start
from loraweave.errors import LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import require_everywhere


def put_expert(model: ExpertModel, expert: int, adapter: Adapter) -> ExpertModel:
    """Put the adapter in as the expert of that number, at weight 1; return the model.

    Layers that the adapter lacks are zero, and ranks below the expert's are filled with zeros. Raises LayerMismatch for
    layers where the model has no such expert, for other sizes and for a larger rank, UnknownName for a number that no expert
    has, ScopeError for a recipe whose experts are no updates, WeightingError for a value that is no adapter or expert
    model; the model is then as it was.
    """
    require_expert_model(model, "put_expert()")
    if not isinstance(adapter, Adapter):
        raise WeightingError(
            f"expert {expert!r} of recipe {model.recipe.name!r} would be {adapter!r:.60}, which is no adapter: give an "
            "Adapter, such as expert(number) of another model or one of a hub"
        )
    require_everywhere(adapter.name, adapter, "an expert model's experts count for every token")
    layers = layers_with(model, (expert,))
    if beyond := sorted(set(adapter.layers) - set(layers)):
        raise LayerMismatch(
            f"adapter {adapter.name!r} updates {beyond[0]!r}, which has no experts here: widen target_modules of recipe "
            f"{model.recipe.name!r}"
        )
    put = {name: _start(name, layer, expert, adapter) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.reset([put[name] if number == expert else start for number, start in enumerate(layer.starts())])
    return model


def layers_with(model: ExpertModel, experts: Iterable[int]) -> dict[str, SumOfExperts]:
    """Return the layers by name that have one of these experts, each a product of two factors of its own.

    Raises UnknownName for a number that no expert has, ScopeError for a recipe whose experts are no such products.
    """
    name, layers = model.recipe.name, model.named_layers()
    for layer in layers.values():
        if not layer.is_update:
            raise ScopeError(f"experts of recipe {name!r} are no updates of layers, and are not exchanged")
        if layer.shape.shared_a or layer.shape.shared_b or layer.shape.gains:
            raise ScopeError(
                f"experts of recipe {name!r} share a factor or have gains, so that none is exchanged without the others: "
                "take a recipe whose experts are products of two factors of their own"
            )
    for expert in experts:
        if not any(has_expert(layer, expert) for layer in layers.values()):
            raise UnknownName(f"recipe {name!r} has no expert {expert!r} in any layer")
    return {path: layer for path, layer in layers.items() if any(has_expert(layer, expert) for expert in experts)}


def has_expert(layer: SumOfExperts, expert: int) -> bool:
    """Return whether an expert of that number has a rank in this layer."""
    return is_whole(expert, 0) and expert < layer.shape.num_experts and layer.shape.ranks[expert] > 0


def _start(name: str, layer: SumOfExperts, expert: int, adapter: Adapter) -> Start:
    a_RI, b_RO = (torch.zeros_like(values) for values in layer.starts()[expert])
    if (factors := adapter.layers.get(name)) is None:
        return a_RI, b_RO
    sizes, limits = (factors.rank, factors.a_RI.shape[1], factors.b_OR.shape[0]), (*a_RI.shape, b_RO.shape[1])
    if factors.gain_O is not None or factors.bias_O is not None or sizes[1:] != limits[1:] or sizes[0] > limits[0]:
        raise LayerMismatch(
            f"adapter {adapter.name!r} has rank, inputs and outputs {sizes} at {name!r}, and expert {expert} takes "
            f"{limits}, or a smaller rank, and no gains or biases: make the recipe with that rank"
        )
    a_RI[: factors.rank] = factors.a_RI.to(a_RI)
    b_RO[: factors.rank] = factors.b_OR.T.to(b_RO) / layer.scale
    return a_RI, b_RO
