"""RandLoRA (Albert et al. 2025, arXiv 2502.00987): many fixed random matrices with trained diagonals, of full rank."""

from loraweave import AdapterCorrupt
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type


@peft_type(
    "randlora_lambda randlora_gamma randlora_A randlora_B",
    "randlora_alpha save_projection r projection_prng_key sparse very_sparse randlora_dropout",
    shared="randlora_A randlora_B",
)
def randlora(layer: StoredLayer) -> Dense:
    """Return alpha/r times a sum of B_n diag(lambda_n) A diag(gamma_n), transposed where O < I: cut to `max_error`."""
    small, large = sorted((layer.base.num_outputs, layer.base.num_inputs))
    layer.require_shared("randlora_A", "randlora_B")
    lambda_RN = layer.part("randlora_lambda", None, None)
    rank, bases = lambda_RN.shape
    gamma_NI = layer.part("randlora_gamma", bases, small)
    a_RI, b_ONR = layer.part("randlora_A", rank, 1, None)[:, 0, :small], layer.part("randlora_B", None, None, rank)
    if a_RI.shape[1] < small or b_ONR.shape[0] < large or b_ONR.shape[1] < bases:
        raise AdapterCorrupt(f"{layer.where}: the shared matrices are smaller than the layer, {(large, small)}")
    # PEFT lays the rank rows of A out by (r, n) and those of B by (n, r), and pairs them in that order
    rows_SI = (lambda_RN[:, :, None] * a_RI[:, None, :] * gamma_NI[None]).flatten(0, 1)
    delta = b_ONR[:large, :bases].flatten(1) @ rows_SI * (layer.config.number("randlora_alpha") / rank)
    # PEFT puts the large side at the inputs where the sizes are equal or the outputs are fewer
    return Dense(delta if layer.base.num_inputs == small else delta.T)
