"""AdapterFusion (Pfeiffer et al., EACL 2021, arXiv 2005.00247) over LoRAs: the layer's input asks, the outputs answer."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.common.options import Count, Positive
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._forms import OutputAttention
from loraweave.routers.tokens._members import LayerTensors, Members

# of queries and keys at the start, as published
STD = 0.02


class AdapterFusion(OutputAttention):
    """w = softmax over experts of (q x + c) . (k E_e(x)) / temperature, with learned q, c and k for each layer.

    E_e(x) = b_e a_e x is what expert e adds, without its gain and bias. A bias of the keys adds the same to every score and
    is left out. The value matrix V is left at the identity, where it begins and where its penalty |V - I|^2 draws it: the
    published layer adds V sum w_e E_e(x), which is not a mixture of the experts any more, and has a matrix of the model's
    size to train. Adapters in the paper are modules between the layers; here they are LoRAs, and each layer has
    a fusion of its own.

    `dim` is the number of queries and keys, by default the smaller of the layer's inputs and outputs, which in a square
    layer is the published size; a small number costs less and trains faster. Raises what `OutputRouter` raises.
    """

    def __init__(self, pool: ExpertPool | Members, *, dim: Count | None = None, temperature: Positive = 1.0) -> None:
        super().__init__(pool, scale=1 / temperature)
        self.dim = dim
        self.temperature = temperature
        self.query_biases_ = LayerTensors({}, learned=True)
        for layer, routed in self.informed.items():
            size = dim or min(routed.num_inputs, routed.num_outputs)
            self.queries_[layer] = STD * torch.randn(size, routed.num_inputs)
            self.keys_[layer] = STD * torch.randn(size, routed.num_outputs)
            self.query_biases_[layer] = torch.zeros(size)

    def query_bias(self, layer: str) -> Tensor:
        """c of the layer."""
        return self.query_biases_[layer]
