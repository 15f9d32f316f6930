"""The key of a model in files, which an engine has and this process has not loaded."""

import pytest
import torch

from loraweave.extensions.engines.folders import stored_base
from loraweave.hub.base import fingerprint
from loraweave.types import BaseKey


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_key_of_a_stored_model_is_that_of_the_loaded_one(make_model, tmp_path, dtype):
    model = make_model("llama").to(dtype)
    model.save_pretrained(tmp_path / "model")
    stored, shapes = stored_base(str(tmp_path / "model"))
    assert stored.fingerprint == fingerprint(model)
    assert shapes == {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    model.save_pretrained(tmp_path / "other")
    assert "sampled weights differ" in stored.contradicts(stored_base(str(tmp_path / "other"))[0])


def test_a_model_that_is_not_at_hand_has_a_key_without_a_fingerprint():
    assert stored_base("org/nowhere") == (BaseKey("org/nowhere"), {})
