"""Small adapters to be paged: of different ranks and layers, with their sizes and a comparison with what a lease has."""

import torch

from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

CPU = torch.device("cpu")
FP32 = (CPU, torch.float32)
LAYERS = {"q": (5, 7), "v": (3, 7), "down": (6, 11)}
PLACES = dict.fromkeys(LAYERS, FP32)
NAMES = [f"e{number}" for number in range(8)]


def random(*shape, generator):
    return torch.randn(*shape, generator=generator)


def adapter(number, *, affine=False):
    """Ranks and layers that depend on the number."""
    generator = torch.Generator().manual_seed(number)
    layers = {}
    for place, (layer, (num_out, num_in)) in enumerate(LAYERS.items()):
        if (number + place) % 4:
            rank = 1 + (number * 3 + place) % 5
            layers[layer] = Factors(
                random(rank, num_in, generator=generator),
                random(num_out, rank, generator=generator),
                gain_O=random(num_out, generator=generator) if affine and number % 2 else None,
                bias_O=random(num_out, generator=generator) if affine else None,
            )
    return Adapter(f"e{number}", "tiny", layers)


ADAPTERS = {name: adapter(number, affine=number > 4) for number, name in enumerate(NAMES)}


def size_of(name, itemsize=4):
    return sum(
        itemsize * (factors.a_RI.numel() + factors.b_OR.numel())
        + 4 * sum(tensor.numel() for tensor in (factors.gain_O, factors.bias_O) if tensor is not None)
        for factors in ADAPTERS[name].layers.values()
    )


def everything(device):
    """Has the CPU treated as a device that is filled by way of the host."""
    return True


def assert_the_adapters_own(lease, name, place=FP32):
    for layer in LAYERS:
        part = lease.part(name, layer, *place)
        factors = ADAPTERS[name].layers.get(layer)
        if factors is None:
            assert part is None
            continue
        assert torch.equal(part.a_RI, factors.a_RI.to(*place))
        assert torch.equal(part.b_RO, factors.b_OR.T.to(*place))
        for found, own in ((part.gain_O, factors.gain_O), (part.bias_O, factors.bias_O)):
            assert (found is None) == (own is None)
            assert found is None or torch.equal(found.cpu(), own)
