"""Where the parts of adapters lie, of which only those on some devices may be asked for."""

from __future__ import annotations

import torch

from loraweave.composer.live.pages import Layout
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

CPU, META = torch.device("cpu"), torch.device("meta")


def test_parts_of_the_layers_on_a_device_are_made_whichever_layers_are_elsewhere() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = {"a": (2, 5, 7), "b": (3, 4, 6), "c": (1, 3, 2), "d": (2, 2, 9)}
    layers = {
        layer: Factors(torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw))
        for layer, (rank, outputs, inputs) in sizes.items()
    }
    adapter = Adapter("x", "tiny", layers)
    places = {layer: (META if layer in "ac" else CPU, torch.bfloat16) for layer in layers}
    layout = Layout(adapter, places, lambda device: device == META)
    views = layout.make_views(layout.make_flats(adapter, staged=False), adapter, staged=False)
    assert set(views) == {"b", "d"}
    for layer, placed in views.items():
        assert torch.equal(placed.a_RI, layers[layer].a_RI.bfloat16())
        assert torch.equal(placed.b_RO, layers[layer].b_OR.T.bfloat16())
    # two bytes a number
    assert layout.num_bytes[False] == 2 * sum(rank * (outputs + inputs) for rank, outputs, inputs in map(sizes.get, "bd"))
