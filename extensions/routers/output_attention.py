"""The base of routers that attend to the experts' own outputs, with queries and keys for each layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from loraweave import ExpertPool
from loraweave.extend import LayerTensors, Members, OutputRouter, without


class OutputAttention(OutputRouter):
    """A router by s_e = scale * query(x) . k E_e(x), with learned query(x) = q x and k of each layer, not of each expert.

    A subclass puts q_DI into `queries_` and k_DO into `keys_` for each of the `informed` layers, D being any number; in all
    others the experts score 0.
    """

    def __init__(self, pool: ExpertPool | Members, *, scale: float) -> None:
        super().__init__(pool)
        self.scale = scale
        self.queries_ = LayerTensors({}, learned=True)
        self.keys_ = LayerTensors({}, learned=True)

    def query_bias(self, layer: str) -> Tensor | None:
        """Return what is added to q x in a layer's queries, or None."""
        return None

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return s_BTE of the layer's experts, -inf for the others."""
        z_BTS = self.latents(x_BTI, layer)
        if layer in self.queries_:
            z_BTS = z_BTS * self._query_products(x_BTI, layer) * self.scale
        scores_BTE = self.by_expert(z_BTS, layer)
        return without(scores_BTE, self.members.layers[layer].experts)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE; each token's weights sum to 1."""
        scores_BTE = self.scores(x_BTI, layer)
        return self.note(layer, scores_BTE, scores_BTE.softmax(dim=-1))

    def _query_products(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return k_s . query(x) for each row s of the bases (B, T, S), by the cheaper order of the two products."""
        q_DI, bias_D = self.queries_[layer], self.query_bias(layer)
        x_BTI = x_BTI.to(q_DI.dtype)
        # k E_e(x) = k q z: the keys meet the bases once a call, and no output is formed
        k_SD = self.bases_[layer] @ self.keys_[layer].T
        (size, num_inputs), num_rows, num_tokens = q_DI.shape, len(k_SD), x_BTI.shape[0] * x_BTI.shape[1]
        if num_tokens * (size * (num_inputs + num_rows) - num_rows * num_inputs) > num_rows * size * num_inputs:
            return functional.linear(x_BTI, k_SD @ q_DI, None if bias_D is None else k_SD @ bias_D)
        return functional.linear(functional.linear(x_BTI, q_DI, bias_D), k_SD)
