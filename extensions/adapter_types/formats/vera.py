"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): shared random factors with two trained vectors per layer."""

from __future__ import annotations

from torch import Tensor

from loraweave import AdapterCorrupt, Factors
from loraweave.extend import words
from loraweave.extensions.adapter_types.formats._foreign import ForeignFormat, StoredLayer, plain_factors


class Vera(ForeignFormat):
    """Delta = diag(lambda_b) B diag(lambda_d) A with A and B cut to the layer's size: exactly of rank r."""

    peft_type = "VERA"
    parts = frozenset({"vera_lambda_b", "vera_lambda_d"})
    shared = frozenset({"vera_A", "vera_B"})
    fields = words("save_projection r projection_prng_key vera_dropout d_initial")

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        return cls.scaled(layer, "vera")

    @classmethod
    def scaled(cls, layer: StoredLayer, name: str, *, values_per_rank: int = 1) -> Factors:
        """Return the update of the tensors `name`_*; lambda_d has `values_per_rank` runs of r values, the first is used."""
        num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
        a_RI, b_OR = _projections(layer, f"{name}_A", f"{name}_B")
        rank = layer.part(f"{name}_lambda_d", None).shape[0] // values_per_rank
        lambda_d_R = layer.part(f"{name}_lambda_d", values_per_rank * rank)[:rank]
        lambda_b_O = layer.part(f"{name}_lambda_b", num_out)
        return plain_factors(lambda_d_R[:, None] * a_RI[:rank, :num_in], lambda_b_O[:, None] * b_OR[:num_out, :rank])


def _projections(layer: StoredLayer, name_a: str, name_b: str) -> tuple[Tensor, Tensor]:
    """Return the shared A and B. Raises AdapterUnsupported if the file omits them, AdapterCorrupt if they are too small."""
    layer.require_shared(name_a, name_b)
    a, b = layer.part(name_a), layer.part(name_b)
    if a.shape[-1] < layer.base.num_inputs or b.shape[0] < layer.base.num_outputs:
        raise AdapterCorrupt(
            f"{layer.where}: the shared matrices {tuple(a.shape)} and {tuple(b.shape)} are smaller than the layer, which "
            f"has (O, I) = {(layer.base.num_outputs, layer.base.num_inputs)}"
        )
    return a, b
