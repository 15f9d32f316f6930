"""The exchange between clients of a federation: experts and gates of their models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from loraweave import Adapter, LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.extend import ExpertModel, is_list, is_number, is_whole, require_everywhere, require_expert_model

# a and b of an expert, (R, I) and (R, O)
Start = tuple[Tensor, Tensor]


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
    layers = _layers([model], (expert,))[0]
    if beyond := sorted(set(adapter.layers) - set(layers)):
        raise LayerMismatch(
            f"adapter {adapter.name!r} updates {beyond[0]!r}, which has no experts here: widen target_modules of recipe "
            f"{model.recipe.name!r}"
        )
    put = {name: _start(name, layer, expert, adapter) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.reset([put[name] if number == expert else start for number, start in enumerate(layer.starts())])
    return model


def federated_average(
    models: Sequence[ExpertModel], sizes: Sequence[float], *, experts: Sequence[int] = (), gates: bool = False
) -> None:
    """Give all clients the mean of what they exchange, weighted by their shares of the data: FedAvg (McMahan et al. 2017).

    The factors a and b of the `experts` are averaged apart, with each client's scale in b; with `gates` the gates'
    parameters are averaged, too. The rest of a client stays as it is, and clients may have different bases where these
    layers are alike. Raises LayerMismatch for clients whose experts or gates differ in place or size, WeightingError for
    sizes that are no amounts of data; the models are then as they were.
    """
    if not is_list(models) or not models:
        raise WeightingError(f"clients are {models!r:.60}: give a list of the expert models of all")
    for model in models:
        require_expert_model(model, "federated_average()")
    amounts: list[Any] = list(sizes) if isinstance(sizes, Iterable) else []
    are_amounts = all(is_number(amount, 0) for amount in amounts)
    if len(amounts) != len(models) or not are_amounts or not sum(amounts):
        raise WeightingError(f"sizes {sizes!r:.60} are not {len(models)} amounts of data, 0 or more, one for each client")
    shares = [amount / sum(amounts) for amount in amounts]
    clients = _layers(models, experts)
    means: dict[tuple[str, int], Start] = {}
    for name in clients[0] if clients else ():
        layers = [client[name] for client in clients]
        for expert in experts:
            # there may be fewer in some layers
            if not all(_has(layer, expert) for layer in layers):
                continue
            of_all = [layer.starts()[expert] for layer in layers]
            _require_same(models, f"expert {expert} at {name!r}", [tuple(a.shape + b.shape) for a, b in of_all])
            scaled = [(a, b * layer.scale) for (a, b), layer in zip(of_all, layers, strict=True)]
            means[name, expert] = (_mean([a for a, _ in scaled], shares), _mean([b for _, b in scaled], shares))
    learned = [dict(model.gates.named_parameters()) for model in models] if gates else []
    _require_same(models, "the gates", [{name: tuple(value.shape) for name, value in named.items()} for named in learned])
    gate_means = {name: _mean([named[name] for named in learned], shares) for name in (learned[0] if learned else ())}
    for client in clients:
        for name, layer in client.items():
            starts = layer.starts()
            for expert in experts:
                if (name, expert) in means:
                    a_RI, b_RO = means[name, expert]
                    starts[expert] = (a_RI, b_RO / layer.scale)
            layer.reset(starts)
    for parameters in learned:
        for name, value in parameters.items():
            value.data.copy_(gate_means[name])


def _layers(models: Sequence[ExpertModel], experts: Sequence[int]) -> list[dict[str, Any]]:
    """Return the layers of each model that have one of these experts, by name; all models must have the same ones."""
    layers_by_model: list[dict[str, Any]] = []
    for model in models if experts else ():
        layers = {}
        for name, layer in model.named_layers().items():
            if not layer.is_update:
                raise ScopeError(f"experts of recipe {model.recipe.name!r} are no updates of layers, and are not exchanged")
            if layer.shape.shared_a or layer.shape.shared_b or layer.shape.gains:
                raise ScopeError(
                    f"experts of recipe {model.recipe.name!r} share a factor or have gains, so that none is exchanged "
                    "without the others: take a recipe whose experts are products of two factors of their own"
                )
            if any(_has(layer, expert) for expert in experts):
                layers[name] = layer
        for expert in experts:
            if not any(_has(layer, expert) for layer in layers.values()):
                raise UnknownName(f"recipe {model.recipe.name!r} has no expert {expert!r} in any layer")
        layers_by_model.append(layers)
    have = [
        {name: [expert for expert in experts if _has(layer, expert)] for name, layer in sorted(layers.items())}
        for layers in layers_by_model
    ]
    _require_same(models, "the layers with these experts", have)
    return layers_by_model


def _has(layer: Any, expert: int) -> bool:
    return is_whole(expert, 0) and expert < layer.shape.num_experts and layer.shape.ranks[expert] > 0


def _start(name: str, layer: Any, expert: int, adapter: Adapter) -> Start:
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


def _require_same(models: Sequence[ExpertModel], what: str, found: Sequence[object]) -> None:
    for number, client_value in enumerate(found):
        if client_value != found[0]:
            raise LayerMismatch(
                f"{what} of client {number} ({models[number].recipe.name}) are {str(client_value)[:200]}, but those of "
                f"client 0 {str(found[0])[:200]}: clients exchange what all have alike"
            )


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value.detach().double().cpu() for value, share in zip(values, shares, strict=True)]).sum(
        dim=0
    )
