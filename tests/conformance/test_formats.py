"""What every format of hub/formats must do: give back what it was given, and refuse what it does not recognise."""

from __future__ import annotations

import pytest
import torch

from loraweave import registry
from loraweave.errors import HubError
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._contents import Contents
from loraweave.types import Factors

FORMATS = registry.names("formats")


@pytest.fixture(params=FORMATS)
def layout(request):
    return registry.get("formats", request.param)


def contents(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        "model.layers.0.q": Factors(torch.randn(3, 5, generator=generator), torch.randn(7, 3, generator=generator)),
        "model.layers.1.q": Factors(torch.randn(1, 5, generator=generator), torch.randn(7, 1, generator=generator)),
    }
    return Contents("base", layers, card={"description": "sorts", "tags": ["words"]})


def test_reading_gives_back_what_was_written(layout, tmp_path):
    given = contents()
    folder = layout.write(given, tmp_path / "adapter")
    assert layout.recognises(folder)
    found = layout.read(folder)
    assert Adapter("a", "base", found.layers).hash == Adapter("b", "base", given.layers).hash
    assert found.base_model == given.base_model
    assert found.card["description"] == "sorts"


def test_every_tensor_of_the_files_matters(layout, tmp_path):
    first, second = (layout.read(layout.write(contents(seed), tmp_path / str(seed))) for seed in (1, 2))
    assert Adapter("a", "base", first.layers).hash != Adapter("a", "base", second.layers).hash


def test_a_folder_of_something_else_is_not_recognised_and_refused_by_name(layout, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    assert not layout.recognises(tmp_path)
    with pytest.raises(HubError, match=r"notes\.txt"):
        layout.read(tmp_path)
