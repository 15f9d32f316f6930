"""What clients of a federation have in common: the means of their experts and gates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from loraweave import LayerMismatch, WeightingError
from loraweave.extend import ExpertModel, has_expert, is_list, is_number, layers_with, require_expert_model


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
    clients = [layers_with(model, experts) for model in models] if experts else []
    have = [
        {name: [expert for expert in experts if has_expert(layer, expert)] for name, layer in sorted(layers.items())}
        for layers in clients
    ]
    _require_same(models, "the layers with these experts", have)
    means: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for name in clients[0] if clients else ():
        layers = [client[name] for client in clients]
        for expert in experts:
            # there may be fewer in some layers
            if not all(has_expert(layer, expert) for layer in layers):
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


def _require_same(models: Sequence[ExpertModel], what: str, values: Sequence[object]) -> None:
    for number, client_value in enumerate(values):
        if client_value != values[0]:
            raise LayerMismatch(
                f"{what} of client {number} ({models[number].recipe.name}) are {str(client_value)[:200]}, but those of "
                f"client 0 {str(values[0])[:200]}: clients exchange what all have alike"
            )


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value.detach().double().cpu() for value, share in zip(tensors, shares, strict=True)]).sum(
        dim=0
    )
