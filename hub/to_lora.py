"""An adapter with parts that depend on the base model (DoRA, (IA)3, a trained bias) as a plain LoRA for that model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loraweave.errors import LayerMismatch
from loraweave.hub import algebra
from loraweave.hub.adapter import Adapter
from loraweave.hub.base_key import base_key
from loraweave.hub.formats._base_layers import BaseLayer, base_layer
from loraweave.hub.formats._conversion import MAX_ERROR, Bound, Dense, cut
from loraweave.hub.same_base import require_same_base
from loraweave.types import Factors


@torch.no_grad()
def to_lora(adapter: Adapter, model: nn.Module, *, rank: int | None = None, max_error: float = MAX_ERROR) -> Adapter:
    """The same adapter with nothing but low-rank factors and a bias in every layer.

    A gain g becomes the matrix diag(g) W, DoRA's magnitude the gain m / |W + b a| - 1 first, and a trained bias its
    difference to the base's. A layer's whole update is then cut to the smallest rank within `max_error` (Frobenius norm,
    relative to the update) and at most `rank`; `card["conversion"]` has rank and relative error of every layer that had
    such a part. DoRA's updates have full rank, so a small `max_error` gives a large adapter.
    Raises BaseModelMismatch for another base model, LayerMismatch for a layer it has not, AdapterUnsupported where `rank`
    leaves an error above `max_error`, or the base's weights are quantised.
    """
    bound = Bound(rank, max_error)
    own = base_key(model)
    require_same_base(f"adapter {adapter.name!r}", adapter.base, own)
    modules = dict(model.named_modules())
    layers: dict[str, Factors] = {}
    notes: dict[str, Any] = {}
    for name, factors in adapter.layers.items():
        where = f"adapter {adapter.name!r}: layer {name!r}"
        if factors.bound and factors.gain_O is None:
            layers[name], note = cut(factors, bound, where)
            if layers[name].rank != factors.rank:
                notes[name] = note
            continue
        layer = base_layer(modules, name, f"adapter {adapter.name!r}")
        update = _whole(factors, layer, where)
        layers[name], notes[name] = cut(update, bound, where, kind=factors.kind, kernel=factors.kernel)
    return replace(adapter, layers=layers, fingerprint=own.fingerprint, card={**adapter.card, "conversion": notes})


def _whole(factors: Factors, layer: BaseLayer, where: str) -> Factors | Dense:
    """The update without a gain: factors where only the bias depended on the base, else one matrix."""
    # a layer of which only the bias was trained is stored without its number of inputs
    inputs = factors.a_RI.shape[1] if factors.rank else layer.num_inputs
    found = (factors.b_OR.shape[0], inputs, factors.kind)
    if found != (layer.num_outputs, layer.num_inputs, layer.kind):
        raise LayerMismatch(
            f"{where}: the update has (O, I, kind) {found}, but the model's {type(layer.module).__name__} has "
            f"{(layer.num_outputs, layer.num_inputs, layer.kind)}"
        )
    if not factors.rank:
        factors = replace(factors, a_RI=torch.zeros(0, inputs))
    bias_O = layer.bias_O if factors.base_bias_O is not None else None
    if factors.magnitude_O is None and factors.gain_O is None:
        # no part depends on the weight, which may be quantised
        return algebra.bind(factors, torch.zeros(0), bias_O)
    bound = algebra.bind(factors, layer.weight_OI, bias_O)
    delta_OI = bound.b_OR.double() @ bound.a_RI.double()
    if bound.gain_O is not None:
        delta_OI += bound.gain_O.double()[:, None] * layer.weight_OI
    return Dense(delta_OI, bound.bias_O)
