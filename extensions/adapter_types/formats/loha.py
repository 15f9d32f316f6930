"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098; Yeh et al. 2023): the elementwise product of two low-rank matrices."""

from loraweave import AdapterUnsupported, Factors
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, check_size, peft_type, plain_factors


@peft_type(
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
    "r alpha alpha_pattern rank_pattern rank_dropout module_dropout use_effective_conv2d",
)
def loha(layer: StoredLayer) -> Factors | Dense:
    """Return alpha/r (W1a W1b) * (W2a W2b) elementwise: by the Khatri-Rao product exactly of rank r^2.

    If r^2 is above the smaller side of the layer, the matrix is formed and cut to `max_error`.
    """
    if layer.has("hada_t1") or layer.has("hada_t2"):
        raise AdapterUnsupported(
            f"{layer.where} is a convolution in Tucker form (use_effective_conv2d), which is not supported; train with False"
        )
    w1a_OR, w2a_OR = layer.part("hada_w1_a", None, None), layer.part("hada_w2_a", None, None)
    (num_out, rank), second = w1a_OR.shape, w2a_OR.shape[1]
    w1b_RI, w2b_RI = layer.part("hada_w1_b", rank, None), layer.part("hada_w2_b", second, None)
    layer.part("hada_w2_a", num_out, None)
    layer.part("hada_w2_b", None, w1b_RI.shape[1])
    scale = layer.config.matched("alpha_pattern", layer.name, "alpha") / rank
    num_in = w1b_RI.shape[1]
    check_size(layer, num_out, num_in)
    if rank * second > min(num_out, num_in):
        return Dense((w1a_OR @ w1b_RI) * (w2a_OR @ w2b_RI) * scale)
    b_OR = (w1a_OR[:, :, None] * w2a_OR[:, None, :]).flatten(1)
    return plain_factors((w1b_RI[:, None, :] * w2b_RI[None, :, :]).flatten(0, 1), b_OR * scale)
