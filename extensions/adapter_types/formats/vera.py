"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): shared random factors with two trained vectors per layer."""

from loraweave import AdapterCorrupt, Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type, plain_factors


@peft_type(
    "vera_lambda_b vera_lambda_d", "save_projection r projection_prng_key vera_dropout d_initial", shared="vera_A vera_B"
)
def vera(layer: StoredLayer) -> Factors:
    """Return diag(lambda_b) B diag(lambda_d) A with A and B cut to the layer's size: exactly of rank r."""
    return scaled(layer, "vera")


def scaled(layer: StoredLayer, name: str, *, values_per_rank: int = 1) -> Factors:
    """Return the update of the tensors `name`_*; lambda_d has `values_per_rank` runs of r values, the first is used.

    Raises AdapterUnsupported if the file omits the shared A and B, AdapterCorrupt if they are too small.
    """
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    layer.require_shared(f"{name}_A", f"{name}_B")
    a_RI, b_OR = layer.part(f"{name}_A"), layer.part(f"{name}_B")
    if a_RI.shape[-1] < num_in or b_OR.shape[0] < num_out:
        raise AdapterCorrupt(
            f"{layer.where}: the shared matrices {tuple(a_RI.shape)} and {tuple(b_OR.shape)} are smaller than the layer, "
            f"which has (O, I) = {(num_out, num_in)}"
        )
    rank = layer.part(f"{name}_lambda_d", None).shape[0] // values_per_rank
    lambda_d_R = layer.part(f"{name}_lambda_d", values_per_rank * rank)[:rank]
    lambda_b_O = layer.part(f"{name}_lambda_b", num_out)
    return plain_factors(lambda_d_R[:, None] * a_RI[:rank, :num_in], lambda_b_O[:, None] * b_OR[:num_out, :rank])
