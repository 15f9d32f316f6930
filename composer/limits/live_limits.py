"""Which of a model's layers a live mixture cannot reach, or not row by row; asked when a mixture is activated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from loraweave.composer.layers import TargetLayer
from loraweave.composer.limits.weight_readers import use_of
from loraweave.errors import LayerMismatch, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.routers.by_row import ByRow
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Router


class LiveLimits:
    """What is known of the target layers of one model; `add` takes those of adapters that are opened later."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # the layers that never run, and those whose first axis need not be the batch, each with the reason as a phrase
        self._never_called: dict[str, str] = {}
        self._out_of_order: dict[str, str] = {}

    def add(self, layers: Mapping[str, TargetLayer]) -> None:
        """Looks at these layers too."""
        embeddings = {name for name, layer in layers.items() if isinstance(layer.module, nn.Embedding)}
        of_tokens = _token_embeddings(self._model) if embeddings else None
        for name, layer in layers.items():
            place, _, attribute = name.rpartition(".")
            owner = self._model.get_submodule(place)
            # MultiheadAttention is the owner of such a layer, in which it keeps a weight for its own product
            if isinstance(layer.module, NonDynamicallyQuantizableLinear) or use_of(owner, attribute) == "read":
                self._never_called[name] = f"which its {type(owner).__name__} never calls, computing with its weight itself"
            if re.search(r"(^|\.)experts\.(expert_)?\d+\.", name):
                self._out_of_order[name] = "sees the tokens that are routed to it, in an order of their own"
            elif name in embeddings and of_tokens is not None and id(layer.module) not in of_tokens:
                self._out_of_order[name] = "is no embedding of tokens, and may be called once for all rows"

    def require(self, weights: MixtureWeights | Router, adapters: Mapping[str, Adapter]) -> None:
        """Raises LayerMismatch where a layer that never runs has weights that are not zero, or a router's; ScopeError where
        weights that vary by row or token meet a layer whose first axis need not be the batch.

        A router for all rows computes its weights from the layer's own input, whatever the order of that is.
        """
        for name, why in self._never_called.items():
            for expert in _users(name, weights, adapters):
                raise LayerMismatch(
                    f"expert {expert!r} updates layer {name!r}, {why}: use fused(), which changes the weight"
                )
        varies = _varies(weights)
        for name, why in self._out_of_order.items() if varies else ():
            for expert in _users(name, weights, adapters):
                raise ScopeError(
                    f"the weights vary by {varies}, but layer {name!r}, which "
                    f"expert {expert!r} updates, {why}: give one mixture for all rows, or name the other layers in "
                    "MixtureWeights(layers=...)"
                )


def _varies(weights: MixtureWeights | Router) -> str:
    """By what the weights vary that is told from the place on an axis; empty where by nothing."""
    if isinstance(weights, ByRow):
        return "row" if weights.num_rows > 1 else ""
    if not isinstance(weights, MixtureWeights) or weights.scope == "task":
        return ""
    return "row" if weights.scope == "instance" else "token"


def _users(layer: str, weights: MixtureWeights | Router, adapters: Mapping[str, Adapter]) -> Iterable[str]:
    """The experts that update the layer and may have a weight there that is not zero."""
    return (name for name in _used(layer, weights, adapters) if layer in adapters[name].layers)


def _used(layer: str, weights: MixtureWeights | Router, adapters: Mapping[str, Adapter]) -> Iterable[str]:
    if isinstance(weights, ByRow):
        rows = [_used(layer, row, adapters) for row in weights.routers if row is not None]
        return {name for names in rows for name in names}
    if isinstance(weights, MixtureWeights):
        used_E = (weights.for_layer(layer) != 0).flatten(0, 1).any(dim=0).tolist()
        return [name for name, used in zip(weights.experts, used_E, strict=True) if used]
    return adapters


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
