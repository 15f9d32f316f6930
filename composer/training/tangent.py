"""What a linearised training added to the adapter that it began from."""

from __future__ import annotations

from dataclasses import replace

import torch

from loraweave.errors import LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


def tangent(adapter: Adapter, start: Adapter) -> Adapter:
    """phi - phi0 of L-LoRA as an update: (b - b0) a0 + b0 (a - a0), exactly, of at most twice the start's rank.

    `adapter` comes from `train_adapters(..., linearized=True, start={...: start})`. In a pool of `start` and the tangents of
    several such adapters, the mixture of start at 1 and of tangents at weights l_e is, in each layer, the linearised model
    at phi0 + sum of l_e (phi_e - phi0). An adapter trained without a start is its own tangent.

    Raises LayerMismatch for an adapter that was not trained that way.
    """
    if list(adapter.layers) != list(start.layers):
        raise LayerMismatch(f"adapter {adapter.name!r} has other layers than {start.name!r}, so it did not start from it")
    return replace(adapter, layers={layer: _tangent(layer, adapter, start) for layer in adapter.layers})


def _tangent(layer: str, adapter: Adapter, start: Adapter) -> Factors:
    own, its = adapter.layers[layer], start.layers[layer]
    rank = its.rank
    moved = bool(its.b_OR.any())
    if own.rank != rank * (1 + moved) or not torch.equal(own.a_RI[:rank], its.a_RI.float()):
        raise LayerMismatch(
            f"adapter {adapter.name!r} is no linearised training of {start.name!r}: in layer {layer!r} its first "
            f"{rank} rows of a are not those it would have begun from; pass linearized=True to train_adapters"
        )
    if not moved:
        return own
    return replace(own, b_OR=torch.cat([own.b_OR[:, :rank] - its.b_OR, own.b_OR[:, rank:]], dim=1))
