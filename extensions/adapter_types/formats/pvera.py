"""PVeRA, the probabilistic VeRA of PEFT 0.21: at inference, the mean of the vectors that it samples in training."""

from loraweave import Factors
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type
from loraweave.extensions.adapter_types.formats.vera import scaled


@peft_type(
    "pvera_lambda_b pvera_lambda_d",
    "save_projection r projection_prng_key pvera_dropout d_initial generator_seed",
    shared="pvera_A pvera_B",
    refused={
        "sample_at_inference": "outputs are sampled, so there is no one update; save it with sample_at_inference=False"
    },
)
def pvera(layer: StoredLayer) -> Factors:
    """Return diag(lambda_b) B diag(lambda_d) A with the first half of lambda_d and of A, which is the mean."""
    return scaled(layer, "pvera", values_per_rank=2)
