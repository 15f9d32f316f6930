"""PEANuT (Zhong et al. 2024, arXiv 2410.01870): an update that a small trained network computes from the base's weight."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from loraweave import Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@peft_type(
    " ".join(
        {"peanut_A.weight", "peanut_B.weight"}
        | {f"peanut_{side}coders.{level}.weight" for side in ("en", "de") for level in range(64)}
    ),
    "depth act_fn scaling r",
)
def peanut(layer: StoredLayer) -> Factors:
    """Return scaling B h(W)^T, h being a network applied to every column of W: exactly of rank r."""
    num_out, depth = layer.base.num_outputs, layer.config.count("depth", 0, least=0)
    active = ACTIVATIONS[layer.choice("act_fn", ACTIVATIONS, "relu")]
    encoder_RO = layer.part("peanut_A.weight", None, num_out)
    rank = encoder_RO.shape[0]
    hidden_IR = active(layer.base.weight_OI.T @ encoder_RO.T)
    seen: list[Tensor] = []
    for level in range(depth):
        seen.append(hidden_IR)
        hidden_IR = active(hidden_IR @ layer.part(f"peanut_encoders.{level}.weight", rank, rank).T)
    for level in range(depth):
        hidden_IR = active(hidden_IR @ layer.part(f"peanut_decoders.{level}.weight", rank, rank).T) + seen[-1 - level]
    decoder_OR = layer.part("peanut_B.weight", num_out, rank)
    return plain_factors(hidden_IR.T, decoder_OR * layer.config.number("scaling", 1.0))
