"""The state of a training on disk: what happens where it cannot be written."""

from __future__ import annotations

import errno
import logging

import torch
from safetensors import SafetensorError

from loraweave.common import state as _saved_tensors
from loraweave.common.state import TrainingState, load_state, save_state


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
