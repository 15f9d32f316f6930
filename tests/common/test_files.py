from __future__ import annotations

import errno
import logging
import os

import pytest
import torch
from safetensors import SafetensorError

from loraweave.common import descent as _saved_tensors
from loraweave.common.descent import TrainingState, load_state, save_state
from loraweave.common.files import whole_file


def test_a_whole_file_takes_the_place_of_the_old_one_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "x"
    target.write_bytes(b"old")
    with whole_file(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert (target.read_bytes(), list(tmp_path.iterdir())) == (b"new", [target])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_after_an_error_the_old_file_stands_alone(tmp_path, monkeypatch, call):
    target = tmp_path / "x"
    target.write_bytes(b"old")

    def full(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="full"), whole_file(target) as temporary:
        temporary.write_bytes(b"new")
    assert (target.read_bytes(), list(tmp_path.iterdir())) == (b"old", [target])


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    with whole_file(tmp_path / "x") as temporary:
        temporary.write_bytes(b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_full_disk_is_said_and_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    save_state(tmp_path, "key", TrainingState(3, {"step": torch.tensor([3]), "a": torch.ones(2)}))

    def full(*arguments, **options):
        raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")

    with monkeypatch.context() as patch:
        patch.setattr(_saved_tensors, "save_file", full)
        save_state(tmp_path, "key", TrainingState(4, {"step": torch.tensor([4]), "a": torch.zeros(2)}))
    assert "step 4 was not written" in caplog.text
    state = load_state(tmp_path, "key")
    assert state is not None
    assert state.step == 3
