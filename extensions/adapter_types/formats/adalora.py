"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): a LoRA in the form of an SVD, whose ranks were pruned in training."""

from loraweave import AdapterUnsupported, Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type(
    "lora_A lora_B lora_E",
    "init_r lora_alpha r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step lora_dropout "
    "rank_pattern alpha_pattern megatron_core loftq_config qalora_group_size runtime_config init_lora_weights",
)
def adalora(layer: StoredLayer) -> Factors:
    """Return alpha / (init_r + 1e-5) B diag(E) A: exactly of the rank that pruning left."""
    # pruning may leave a rank of 0
    a_RI, b_OR = layer.pair("lora_A", "lora_B", empty=True)
    e_R = layer.part("lora_E", a_RI.shape[0], 1)[:, 0]
    alpha = layer.config.number("lora_alpha")
    if alpha <= 0:
        raise AdapterUnsupported(
            f"{layer.config.folder}: lora_alpha is {alpha:g}; PEFT then scales by a rank it does not store"
        )
    # PEFT divides by the rank before pruning, and adds 1e-5 to it
    scale = alpha / (layer.config.count("init_r") + 1e-5)
    used = e_R != 0
    return plain_factors(a_RI[used], b_OR[:, used] * e_R[used] * scale)
