"""Factors that a hub keeps in few bits: read, verified and collected like any other, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_hubs import adapter
from tiny_models import random_factors

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.extensions.upkeep import rebuild
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.stores.blobs import blob_bytes, content_hash, read_blob
from loraweave.hub.stores.folder_blobs import FolderBlobs, blob_path
from loraweave.types import Factors


def factors(seed, rank=3, outputs=5, inputs=7):
    return random_factors(torch.Generator().manual_seed(seed), rank, outputs, inputs)


def write(folder, layers, **options):
    content = content_hash(layers, options.get("heads", {}))
    digest = FolderBlobs(folder).put(content, blob_bytes(layers, '{"name":"x"}', **options))
    return blob_path(folder, content), digest


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as opened:
        yield opened


HEADS = {"score.weight": torch.ones(2, 7)}
TERNARY = {
    "q": Factors(factors(7).a_RI.sign() * 0.37, factors(7).b_OR.sign() * 0.02, bias_O=torch.randn(5)),
    "v": Factors(torch.zeros(3, 7), factors(8).b_OR.sign() * 0.37),
}


def test_ternary_factors_come_back_bit_for_bit_from_few_bits(tmp_path):
    path, _ = write(tmp_path, TERNARY, heads=HEADS, stored_as="compeft")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"signs", "scales", "packed"}
    assert read_blob(path, "x").content_hash() == path.stem


def test_factors_that_are_not_ternary_leave_no_file_in_that_form(tmp_path):
    with pytest.raises(AdapterUnsupported, match=r"a_RI of layer 'conv'.*compeft\(adapter\) of .*methods"):
        write(tmp_path, {"conv": factors(3)}, stored_as="compeft")
    with pytest.raises(AdapterUnsupported, match="'factors' or 'compeft', not as 'zip'"):
        write(tmp_path, TERNARY, stored_as="zip")
    assert not list(tmp_path.iterdir())


def test_a_damaged_ternary_stream_is_corrupt_by_the_name_of_its_file(tmp_path):
    tensors = {"signs": torch.tensor([1, 2, 3], dtype=torch.uint8), "scales": torch.ones(1)}
    entry = {"path": "q", "kind": "linear", "kernel": [], "parts": [], "shape": [5, 3, 7]}
    header = {"version": 2, "layers": [entry], "stored_as": "compeft", "origin": {}}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"loraweave": json.dumps(header)})
    with pytest.raises(AdapterCorrupt, match=r"adapter 'x': blob .*x\.safetensors cannot be read .*ternary stream"):
        read_blob(path, "adapter 'x'")


def test_a_ternary_adapter_in_few_bits_is_read_verified_collected_and_rebuilt_like_any_other(hub):
    signs = adapter(0).layers["layer"]
    given = Adapter("ternary", "org/base", {"layer": Factors(signs.a_RI.sign() * 0.37, signs.b_OR.sign() * 0.37)})
    record = hub.add(given, stored_as="compeft")
    assert record.hash == given.hash
    assert hub["ternary"].hash == given.hash
    assert hub.verify().ok
    assert hub.add(given) == record
    hub.close()
    (hub.path / "catalogue.sqlite").unlink()
    assert rebuild(hub.path) == ["ternary"]
    with Hub(hub.path) as rebuilt:
        assert rebuilt["ternary"].hash == given.hash
        rebuilt.remove("ternary")
        assert rebuilt.gc() == record.size_bytes


def test_what_is_not_ternary_is_refused_in_that_form_and_nothing_is_written(hub):
    with pytest.raises(AdapterUnsupported, match=r"compeft\(adapter\) of .*methods"):
        hub.add(adapter(0), stored_as="compeft")
    with pytest.raises(AdapterUnsupported, match="not as 'zip'"):
        hub.add(adapter(0), stored_as="zip")
    assert len(hub) == 0
    assert list(hub._blobs.names()) == []
