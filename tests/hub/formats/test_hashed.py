"""Tensors whose hash another file has."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt
from loraweave.hub.formats._safetensors import hashed_tensors


@pytest.fixture
def digest(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "values.safetensors")
    return hashlib.sha256((tmp_path / "values.safetensors").read_bytes()).hexdigest()


def test_the_tensors_are_read_where_the_hash_is_theirs(tmp_path, digest):
    found = hashed_tensors(tmp_path, "values.safetensors", digest, said_by="about.json")
    assert found.keys() == {"a"}
    assert torch.equal(found["a"], torch.arange(3.0))


def test_another_hash_is_refused_with_both(tmp_path, digest):
    with pytest.raises(AdapterCorrupt, match=f"has SHA-256 {digest[:12]}, but about.json says 000000000000"):
        hashed_tensors(tmp_path, "values.safetensors", "0" * 64, said_by="about.json")
