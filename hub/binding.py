"""Binds a stored adapter to the base model at hand: checks that it fits, so that its record can hold the base's key."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from loraweave.errors import LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.hub.base_key import base_key
from loraweave.hub.formats._base_layers import base_layer
from loraweave.hub.same_base import require_same_base
from loraweave.types import Record


def bound_record(record: Record, adapter: Adapter, model: nn.Module) -> Record:
    """The record with the model's revision and fingerprint, and its id where the adapter names no base.

    BaseModelMismatch where the adapter knows of another fingerprint or revision, LayerMismatch where a layer does not fit.
    """
    key = base_key(model)
    # a model loaded from a folder has the folder's name as its id, so that ids alone say nothing here
    require_same_base(f"adapter {record.name!r}", record.base, key, whatever_id=True)
    modules = dict(model.named_modules())
    for layer, factors in adapter.layers.items():
        found = base_layer(modules, layer, f"adapter {record.name!r}")
        wanted = factors.b_OR.shape[0], factors.a_RI.shape[1]
        if factors.rank and wanted != (found.num_outputs, found.num_inputs):
            raise LayerMismatch(
                f"adapter {record.name!r} updates layer {layer!r} with shape {wanted}, but that of the model {key.id!r} is "
                f"{(found.num_outputs, found.num_inputs)}; it was made for another base model"
            )
    return replace(
        record,
        base_model=record.base_model or key.id,
        base_revision=key.revision or record.base_revision,
        fingerprint=key.fingerprint,
    )
