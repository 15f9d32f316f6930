"""Layers whose first axis need not be the batch: weights that differ between rows would reach the wrong ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from loraweave.composer.layers import TargetLayer
from loraweave.errors import ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Router


def out_of_order(model: nn.Module, layers: Mapping[str, TargetLayer]) -> dict[str, str]:
    """Those of the layers whose input need not have the batch on its first axis, each with the reason as a phrase.

    Embeddings of tokens have it; others are called with positions or distances. An expert among others in a list is called
    with the tokens that are routed to it.
    """
    embeddings = {name for name, layer in layers.items() if isinstance(layer.module, nn.Embedding)}
    of_tokens = _token_embeddings(model) if embeddings else None
    found = {}
    for name, layer in layers.items():
        if re.search(r"(^|\.)experts\.\d+\.", name):
            found[name] = "sees the tokens that are routed to it, in an order of their own"
        elif name in embeddings and of_tokens is not None and id(layer.module) not in of_tokens:
            found[name] = "is no embedding of tokens, and may be called once for all rows"
    return found


def require_batch_order(
    weights: MixtureWeights | Router, layers: Mapping[str, str], adapters: Mapping[str, Adapter]
) -> None:
    """Raises ScopeError where weights that vary by row or token meet a layer of `out_of_order` that they are not zero for.

    A router computes its weights from the layer's own input, whatever the order of that is.
    """
    if not layers or not isinstance(weights, MixtureWeights) or weights.scope == "task":
        return
    for name, why in layers.items():
        used_E = (weights.for_layer(name) != 0).flatten(0, 1).any(dim=0).tolist()
        for expert, used in zip(weights.experts, used_E, strict=True):
            if used and name in adapters[expert].layers:
                raise ScopeError(
                    f"the weights vary by {'row' if weights.scope == 'instance' else 'token'}, but layer {name!r}, which "
                    f"expert {expert!r} updates, {why}: give one mixture for all rows, or name the other layers in "
                    "MixtureWeights(layers=...)"
                )


def _token_embeddings(model: nn.Module) -> set[int] | None:
    """The ids of the modules that a transformers model calls its input embeddings; None for another kind of model."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    found = set()
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            try:
                found.add(id(module.get_input_embeddings()))  # type: ignore[operator]
            # a part of a model without tokens
            except (NotImplementedError, AttributeError):
                continue
    return found
