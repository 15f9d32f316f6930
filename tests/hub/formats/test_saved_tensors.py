"""Files of tensors: without room for one what was there stays, and one with another hash than is said is refused."""

from __future__ import annotations

import errno
import hashlib
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import random_adapter

from loraweave.common.descent import save_tensors
from loraweave.errors import AdapterCorrupt, HubError, HubFull, HubReadOnly
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats import _peft_write, _safetensors
from loraweave.hub.formats._safetensors import hashed_tensors, read_tensors


def adapter(seed):
    return random_adapter("x", {"model.layer": (2, 500, 300)}, seed)


@contextmanager
def little_room(size_bytes):
    """Files may not grow beyond this size, which the system says as it says that the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_adapter_that_finds_no_room_is_named_and_leaves_what_was_there(tmp_path):
    adapter(0).save_pretrained(tmp_path / "x")
    with little_room(4096), pytest.raises(HubFull, match=r"no space left below .*x.*nothing was changed, free some space"):
        adapter(1).save_pretrained(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert Adapter.from_pretrained(tmp_path / "x").hash == adapter(0).hash
    with little_room(4096), pytest.raises(HubFull):
        adapter(1).save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    adapter(1).save_pretrained(tmp_path / "new")


@pytest.mark.parametrize(("number", "wanted"), [(errno.ENOSPC, HubFull), (errno.EROFS, HubReadOnly), (errno.EIO, HubError)])
def test_what_the_file_system_says_of_a_folder_has_a_name(tmp_path, monkeypatch, number, wanted):
    def fail(*arguments, **options):
        raise OSError(number, "as the system says it")

    monkeypatch.setattr(_peft_write, "save_tensors", fail)
    with pytest.raises(wanted, match=r"^writing a folder: ") as found:
        adapter(0).save_pretrained(tmp_path / "x")
    assert type(found.value) is wanted
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_a_failure_is_the_systems(tmp_path):
    with little_room(4096), pytest.raises(OSError, match="too large") as found:
        save_tensors({"a": torch.zeros(4096)}, tmp_path / "a.safetensors")
    assert found.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError):
        save_tensors({"a": torch.zeros(4)}, tmp_path / "absent" / "a.safetensors")


def test_tensors_are_read_where_the_hash_is_theirs_and_another_is_refused_with_both(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "values.safetensors")
    digest = hashlib.sha256((tmp_path / "values.safetensors").read_bytes()).hexdigest()
    found = hashed_tensors(tmp_path, "values.safetensors", digest, said_by="about.json")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [0.0, 1.0, 2.0]}
    with pytest.raises(AdapterCorrupt, match=f"has SHA-256 {digest[:12]}, but about.json says 000000000000"):
        hashed_tensors(tmp_path, "values.safetensors", "0" * 64, said_by="about.json")


@pytest.mark.parametrize("run_bytes", [1, 24, 2**24])
def test_tensors_come_one_by_one_however_many_are_read_at_once(tmp_path, monkeypatch, run_bytes):
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    tensors = {f"t{n}": torch.randn(n, 3, generator=generator).to(kind) for n, kind in enumerate(kinds)}
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(_safetensors, "RUN_BYTES", run_bytes)
    found = {key: tensor for key, _, tensor in read_tensors(tmp_path, ["x.safetensors"])}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in tensors.items())
