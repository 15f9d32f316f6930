"""WaveFT (Bilican et al. 2025, arXiv 2505.12532): a few trained coefficients of the update's wavelet transform."""

import torch
from torch import Tensor

from loraweave import AdapterUnsupported
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type
from loraweave.extensions.adapter_types.formats.fourierft import scatter


@peft_type(
    "waveft_spectrum",
    "scaling random_loc_seed use_idwt wavelet_family n_frequency n_frequency_pattern proportional_parameters",
)
def waveft(layer: StoredLayer) -> Dense:
    """Return scaling * IDWT2(S) with the Haar wavelet (db1), or scaling * S without a transform (SHiRA's form)."""
    sparse_OI = scatter(layer, layer.part("waveft_spectrum", None))
    scale = layer.config.number("scaling")
    if not layer.config.flag("use_idwt", True):
        return Dense(sparse_OI * scale)
    if layer.config.fields.get("wavelet_family", "db1") != "db1":
        raise AdapterUnsupported(
            f"{layer.config.folder}: wavelet_family is {layer.config.fields['wavelet_family']!r}; only 'db1' (Haar) can "
            "be read, since other families need their filter tables"
        )
    return Dense(_haar(sparse_OI) * scale)


def _haar(coefficients_OI: Tensor) -> Tensor:
    """Return one level of the inverse Haar transform; the quarters are approximation, horizontal, vertical, diagonal."""
    num_out, num_in = coefficients_OI.shape
    padded = torch.nn.functional.pad(coefficients_OI, (0, num_in % 2, 0, num_out % 2))
    half_out, half_in = padded.shape[0] // 2, padded.shape[1] // 2
    mean, across = padded[:half_out, :half_in], padded[:half_out, half_in:]
    down, both = padded[half_out:, :half_in], padded[half_out:, half_in:]
    result = torch.zeros_like(padded)
    for row in (0, 1):
        for column in (0, 1):
            result[row::2, column::2] = (
                mean + (-1) ** row * across + (-1) ** column * down + (-1) ** (row + column) * both
            ) / 2
    return result[:num_out, :num_in]
