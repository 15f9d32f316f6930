"""AdapterFusion (Pfeiffer et al., EACL 2021, arXiv 2005.00247) over LoRAs: the layer's input attends to their outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraweave import ExpertPool
from loraweave.extend import Count, LayerTensors, Members, NonNegative, Positive, Step
from loraweave.extensions.routers.output_attention import OutputAttention

# of queries and keys at the start, as published
STD = 0.02
OFF_DIAGONAL = 1e-6


class AdapterFusion(OutputAttention):
    """A router with w = softmax over experts of (q x + c) . (k E_e(x)) / temperature, with learned q, c and k by layer.

    E_e(x) = b_e a_e x is what expert e adds, without its gain and bias. A bias of the keys adds the same to every score and
    is left out. Adapters in the paper are modules between the layers; here they are LoRAs, and each layer has a fusion of
    its own.

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
        # counts where there are values
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
        """Return c of the layer."""
        return self.query_biases_[layer]

    def value_matrix(self, layer: str) -> Tensor | None:
        """Return V_OO of the layer, None for the identity."""
        return self.values_[layer] if self.values and layer in self.values_ else None

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return {"value": the penalty of V}, or {} without values or penalty."""
        if not self.values or not self.penalty or not len(self.values_):
            return {}
        moved = [v_OO - torch.eye(len(v_OO)).to(v_OO) for v_OO in (self.values_[layer] for layer in self.values_)]
        return {"value": self.penalty * torch.stack([each_OO.square().sum() for each_OO in moved]).sum()}
