"""AdapterFusion (Pfeiffer et al., EACL 2021, arXiv 2005.00247) over LoRAs: the layer's input attends to their outputs."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from loraweave import ExpertPool
from loraweave.extend import Count, NonNegative, Positive
from loraweave.extend.routing import LayerTensors, Members, Step, without
from loraweave.extensions.routers.outputs import OutputRouter


class OutputAttention(OutputRouter):
    """A router by s_e = scale * query(x) . k E_e(x), E_e(x) the expert's output, with learned query(x) = q x and k by layer.

    A subclass puts q_DI into `queries_` and k_DO into `keys_` for each of the `informed` layers, D being any number; in all
    others the experts score 0.
    """

    def __init__(self, pool: ExpertPool | Members, *, scale: float) -> None:
        super().__init__(pool)
        self.scale = scale
        self.queries_ = LayerTensors({}, learned=True)
        self.keys_ = LayerTensors({}, learned=True)

    def query_bias(self, layer: str) -> Tensor | None:
        """Return the bias (D) that is added to q x in a layer's queries, or None."""
        return None

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return s_BTE, -inf for experts that do not update the layer."""
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
        """Return k_s . query(x) for each of the layer's S basis rows: (B, T, S), before the scale."""
        q_DI, bias_D = self.queries_[layer], self.query_bias(layer)
        x_BTI = x_BTI.to(q_DI.dtype)
        # k E_e(x) = k q z: the keys meet the bases once a call, and no output is formed
        k_SD = self.bases_[layer] @ self.keys_[layer].T
        (size, num_inputs), num_rows, num_tokens = q_DI.shape, len(k_SD), x_BTI.shape[0] * x_BTI.shape[1]
        if num_tokens * (size * (num_inputs + num_rows) - num_rows * num_inputs) > num_rows * size * num_inputs:
            return functional.linear(x_BTI, k_SD @ q_DI, None if bias_D is None else k_SD @ bias_D)
        return functional.linear(functional.linear(x_BTI, q_DI, bias_D), k_SD)


# the standard deviation of queries and keys at the start, as published
STD = 0.02
OFF_DIAGONAL = 1e-6


class AdapterFusion(OutputAttention):
    """A router with w = softmax over experts of (q x + c) . (k E_e(x)) / temperature, with learned q, c and k by layer.

    E_e(x) = b_e a_e x is what expert e adds, without its gain and bias. A bias of the keys adds the same to every score and
    is left out. Adapters in the paper are modules between the layers; here they are LoRAs, and each layer has its fusion.

    With `values` the layer adds V sum w_e E_e(x), as published, with a learned V_OO: the mixture of experts b'_e = V b_e. V
    begins as the identity, with 1e-6 beside the diagonal, and the loss has `penalty` times the sum over layers of |V - I|^2,
    both as in the authors' code. It has O^2 values a layer; without, V stays the identity. Its weights alone are then not
    what is added, so such a router is activated by itself, not combined with others (ScopeError).

    `dim` is the number of queries and keys, by default the smaller of the layer's inputs and outputs, which in a square
    layer is the published size; a small number costs less and trains faster. Raises what `OutputRouter` raises.
    """

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        dim: Count | None = None,
        temperature: Positive = 1.0,
        values: bool = False,
        penalty: NonNegative = 0.01,
    ) -> None:
        super().__init__(pool, scale=1 / temperature)
        self.dim = dim
        self.temperature = temperature
        self.values = values
        # this only counts with `values`
        self.penalty = penalty
        self.query_biases_ = LayerTensors({}, learned=True)
        self.values_ = LayerTensors({}, learned=True)
        for layer, routed in self.informed.items():
            size = dim or min(routed.num_inputs, routed.num_outputs)
            self.queries_[layer] = STD * torch.randn(size, routed.num_inputs)
            self.keys_[layer] = STD * torch.randn(size, routed.num_outputs)
            self.query_biases_[layer] = torch.zeros(size)
            if values:
                self.values_[layer] = torch.full((routed.num_outputs,) * 2, OFF_DIAGONAL).fill_diagonal_(1.0)

    def query_bias(self, layer: str) -> Tensor:
        """Return the layer's learned bias (D) of the queries."""
        return self.query_biases_[layer]

    def value_matrix(self, layer: str) -> Tensor | None:
        """Return the layer's learned matrix V_OO, which multiplies the mixed outputs; None for the identity."""
        return self.values_[layer] if self.values and layer in self.values_ else None

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return {"value": the penalty of V}, or {} without values or penalty."""
        if not self.values or not self.penalty or not len(self.values_):
            return {}
        moved = [v_OO - torch.eye(len(v_OO)).to(v_OO) for v_OO in (self.values_[layer] for layer in self.values_)]
        return {"value": self.penalty * torch.stack([each_OO.square().sum() for each_OO in moved]).sum()}
