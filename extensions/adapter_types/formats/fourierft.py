"""FourierFT (Gao et al. 2024, arXiv 2405.03003): a few trained coefficients of the update's discrete Fourier transform."""

import torch
from torch import Tensor

from loraweave import AdapterCorrupt
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type


@peft_type("fourierft_spectrum", "scaling random_loc_seed n_frequency n_frequency_pattern")
def fourierft(layer: StoredLayer) -> Dense:
    """Return scaling * Re(IDFT2(F)), F holding the trained values at positions drawn with the config's seed."""
    spectrum_OI = scatter(layer, layer.part("fourierft_spectrum", None))
    return Dense(torch.fft.ifft2(spectrum_OI).real * layer.config.number("scaling"))


def scatter(layer: StoredLayer, values: Tensor) -> Tensor:
    """Return a matrix (O, I) with the 1-D `values` at the positions that PEFT draws with the config's seed, else 0."""
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    if values.shape[0] > num_out * num_in:
        raise AdapterCorrupt(f"{layer.where} has {values.shape[0]} coefficients for a matrix of {num_out} x {num_in}")
    generator = torch.Generator().manual_seed(layer.config.count("random_loc_seed", least=0))
    places = torch.randperm(num_out * num_in, generator=generator)[: values.shape[0]]
    matrix = values.new_zeros(num_out * num_in)
    matrix[places] = values
    return matrix.reshape(num_out, num_in)
