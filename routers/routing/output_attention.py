"""Attention of a token over the outputs of experts: what looks at a set of experts, whichever and however many they are."""

from __future__ import annotations

from torch import Tensor

from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.choosing import without
from loraweave.routers.routing.layer_tensors import LayerTensors
from loraweave.routers.routing.members import Members, RoutedLayer
from loraweave.routers.routing.output_router import OutputRouter


class OutputAttention(OutputRouter):
    """s_e = scale * query(x) . k E_e(x), with learned query(x) = q x and k of each layer; no parameter is one expert's own.

    A subclass puts q_DI into `queries_` and k_DO into `keys_` for each of the `attending` layers, D being any number.
    """

    def __init__(self, pool: ExpertPool | Members, *, scale: float) -> None:
        super().__init__(pool)
        self.scale = scale
        self.queries_ = LayerTensors({}, learned=True)
        self.keys_ = LayerTensors({}, learned=True)

    @property
    def attending(self) -> dict[str, RoutedLayer]:
        """The layers that have inputs to ask with: all but those with trained biases alone, where the experts score 0."""
        return {layer: routed for layer, routed in self.members.layers.items() if routed.num_inputs}

    def query(self, x_BTI: Tensor, layer: str) -> Tensor:
        """The query of each token, (B, T, D)."""
        q_DI = self.queries_[layer]
        return x_BTI.to(q_DI.dtype) @ q_DI.T

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """s_BTE of the layer's experts, -inf for the others."""
        z_BTS = self.latents(x_BTI, layer)
        if layer in self.queries_:
            # k E_e(x) = k q z: the keys meet the bases once a call, and no output is formed
            k_SD = self.bases_[layer] @ self.keys_[layer].T
            z_BTS = z_BTS * (self.query(x_BTI, layer) @ k_SD.T) * self.scale
        scores_BTE = self.by_expert(z_BTS, layer)
        return without(scores_BTE, self.members.layers[layer].experts)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """w_BTE; they sum to 1."""
        scores_BTE = self.scores(x_BTI, layer)
        return self.note(layer, scores_BTE, scores_BTE.softmax(dim=-1))
