"""TinyLoRA (PEFT 0.21): LoRA-XS whose middle matrix is a trained sum of a few fixed random ones, which PEFT stores."""

import torch

from loraweave import AdapterUnsupported, Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors
from loraweave.extensions.adapter_types.formats._placing import GIVE_MODEL


@peft_type(
    "tinylora_A tinylora_B tinylora_P",
    "weight_tying save_projection r u projection_seed init_v_bound tinylora_dropout",
    shared="tinylora_v.",
)
def tinylora(layer: StoredLayer) -> Factors:
    """Return B (sum of v_u P_u) A, v trained, P random, A and B the base's leading singular vectors: exactly of rank r."""
    if not layer.has("tinylora_P"):
        raise AdapterUnsupported(
            f"{layer.where}: the random matrices are not in the file, only the seed they were drawn with, which gives "
            "other numbers in another version of torch; save the adapter with save_projection=True"
        )
    a_RI, b_OR = layer.pair("tinylora_A", "tinylora_B")
    rank = a_RI.shape[0]
    v_U = layer.part(f"tinylora_v.{_group(layer)}", None)
    middle_RR = torch.einsum("u,urs->rs", v_U, layer.part("tinylora_P", v_U.shape[0], rank, rank))
    return plain_factors(a_RI, b_OR @ middle_RR)


def _group(layer: StoredLayer) -> int:
    """Return the number of the trained vector that a layer uses; consecutive layers of the base model share a vector."""
    if len(layer.shared) == 1:
        return 0
    if layer.position is None:
        raise AdapterUnsupported(
            f"{layer.where}: which of the {len(layer.shared)} trained vectors belongs to it follows from the order of the "
            f"base model's modules; {GIVE_MODEL}"
        )
    groups = max(1, round(layer.num_layers * (1.0 - layer.config.number("weight_tying", 0.0))))
    return min(layer.position // max(1, layer.num_layers // groups), groups - 1)
