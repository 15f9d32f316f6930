"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): trained values at a few places of the weight."""

from loraweave import AdapterCorrupt
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type


@peft_type("shira_weight shira_indices", "r mask_type random_seed")
def shira(layer: StoredLayer) -> Dense:
    """Return the trained values at the stored places, zeros elsewhere."""
    num_out, num_in = layer.base.num_outputs, layer.base.num_inputs
    values = layer.part("shira_weight", None)
    rows, columns = layer.places("shira_indices", 2, values.shape[0], below=max(num_out, num_in))
    if bool((rows >= num_out).any()) or bool((columns >= num_in).any()):
        raise AdapterCorrupt(f"{layer.where}: 'shira_indices' has places outside a matrix of {num_out} x {num_in}")
    delta_OI = values.new_zeros(num_out, num_in)
    # a place that is named twice counts twice, as in PEFT
    delta_OI.index_put_((rows, columns), values, accumulate=True)
    return Dense(delta_OI)
