"""Super-Tuning (PEFT 0.21): trained values at the largest or smallest weights, and optionally a LoRA beside them."""

from loraweave import AdapterUnsupported
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type


@peft_type(
    "supertuning_values supertuning_indices supertuning_lora_A.weight supertuning_lora_B.weight",
    "r lora_alpha save_precomputed_indices sparsity select_top lora_dropout",
)
def supertuning(layer: StoredLayer) -> Dense:
    """Return the trained values at the stored places of the flattened weight, plus alpha/r B A if the config has r."""
    if not layer.has("supertuning_indices"):
        raise AdapterUnsupported(
            f"{layer.where}: the places are not in the file; save the adapter with save_precomputed_indices=True"
        )
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    values = layer.part("supertuning_values", None)
    places = layer.places("supertuning_indices", values.shape[0], below=num_out * num_in)
    delta_OI = values.new_zeros(num_out * num_in).index_add_(0, places, values).reshape(num_out, num_in)
    if layer.config.fields.get("r") is not None:
        rank = layer.config.count("r")
        a_RI = layer.part("supertuning_lora_A.weight", rank, num_in)
        b_OR = layer.part("supertuning_lora_B.weight", num_out, rank)
        delta_OI += b_OR @ a_RI * (layer.config.number("lora_alpha") / rank)
    return Dense(delta_OI)
