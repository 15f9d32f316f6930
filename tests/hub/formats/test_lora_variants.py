"""LoRA with one field more: what that field may not be. That it is read right is in test_other_types.py, against peft."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter

PATH = "base_model.model.inner.q_proj"


def put(folder, config, *, a=(4, 3), b=(10, 4), **extra):
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    held = {f"{PATH}.lora_A.weight": torch.ones(a), f"{PATH}.lora_B.weight": torch.ones(b)}
    save_file({**held, **{f"{PATH}.{name}": tensor for name, tensor in extra.items()}}, folder / "adapter_model.safetensors")
    return folder


def blocks(**fields):
    return {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2, **fields}}


def test_a_blocked_factor_is_widened_and_scaled_and_the_other_left(tmp_path):
    delta = Adapter.from_pretrained(put(tmp_path, blocks())).delta("inner.q_proj")
    assert torch.equal(delta, torch.full((10, 6), 4.0))


REFUSED = {
    "no object": ({"use_bdlora": True}, {}, AdapterCorrupt, "not an object"),
    "an unknown field": (blocks(new=1), {}, AdapterUnsupported, "'new'"),
    "no count": (blocks(nblocks=0), {}, AdapterCorrupt, "nblocks is 0"),
    "no list": (blocks(target_modules_bd_b="q_proj"), {}, AdapterCorrupt, "target_modules_bd_b is 'q_proj', not a list"),
    "both factors": (blocks(target_modules_bd_b=["q"]), {}, AdapterCorrupt, "both factors"),
    "rows that do not divide": (blocks(nblocks=3), {}, AdapterCorrupt, r"\(4, 3\) does not divide into 3"),
    "another rank": ({**blocks(), "r": 2}, {}, AdapterCorrupt, "rank 4 in the file and rank 2"),
    "DoRA": ({**blocks(), "use_dora": True}, {}, AdapterUnsupported, "use_dora=True beside use_bdlora"),
    "trained biases": ({**blocks(), "bias": "all"}, {}, AdapterUnsupported, "bias='all'"),
    "two variants": ({**blocks(), "kasa_config": {"beta": 1}}, {}, AdapterUnsupported, "kasa_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_blocks_that_are_not_understood_are_refused(tmp_path, case):
    config, options, error, named = REFUSED[case]
    with pytest.raises(error, match=named):
        Adapter.from_pretrained(put(tmp_path, config, **options))


def test_kasa_needs_the_weights_and_its_own_diagonal(tmp_path):
    def base(num_in):
        return nn.ModuleDict({"inner": nn.ModuleDict({"q_proj": nn.Linear(num_in, 10)})})

    kasa = {"kasa_config": {"beta": 1e-4}}
    put(tmp_path, kasa, a=(4, 6), lora_diag=torch.ones(4))
    assert Adapter.from_pretrained(tmp_path, model=base(6)).rank == 6
    with pytest.raises(AdapterUnsupported, match="model=model"):
        Adapter.from_pretrained(tmp_path)
    put(tmp_path, kasa, a=(4, 4), lora_diag=torch.ones(4))
    with pytest.raises(AdapterCorrupt, match=r"rank 4 .* does not fit the base's \(O, I\) = \(10, 4\)"):
        Adapter.from_pretrained(tmp_path, model=base(4))
    put(tmp_path, kasa, a=(4, 6))
    with pytest.raises(AdapterCorrupt, match="lacks the tensor 'lora_diag'"):
        Adapter.from_pretrained(tmp_path, model=base(6))
