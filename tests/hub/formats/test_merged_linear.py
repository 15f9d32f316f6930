"""LoRA on parts of a fused projection, against the convolution in groups that PEFT before 0.3 and loralib compute."""

import json

import pytest
import torch
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats.merged_linear import MergedLinear

LAYER = "transformer.h.0.self_attention.query_key_value"
NUM_IN = 7


def put(folder, enable, *, part=5, rank=2, groups=None, flat=False, config=None):
    """A file as PEFT 0.2 writes it; gives A and B."""
    used = sum(enable)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rank * used, NUM_IN, generator=generator)
    b = torch.randn(part * used, rank * used // (groups or used), 1, generator=generator)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "enable_lora": enable, "fan_in_fan_out": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **(config or {})}))
    path = f"base_model.model.{LAYER}"
    stored = b[..., 0].contiguous() if flat else b
    save_file({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": stored}, folder / "adapter_model.safetensors")
    return a, b


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("enable", [[True, False, True], [True, True, True], [False, True, False], [True, True], [True]])
def test_the_update_is_the_convolution_in_groups_at_the_places_of_the_parts(tmp_path, enable, flat):
    a, b = put(tmp_path, enable, flat=flat)
    x = torch.randn(4, NUM_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner = torch.nn.functional.conv1d((x @ a.double().T)[..., None], b.double(), groups=sum(enable))[..., 0]
    places = torch.tensor(enable).repeat_interleave(5)
    expected = torch.zeros(4, 5 * len(enable), dtype=torch.float64)
    expected[:, places] = inner * 3 / 2
    update = Adapter.from_pretrained(tmp_path).delta(LAYER).double()
    torch.testing.assert_close(x @ update.T, expected, rtol=1e-6, atol=1e-6)


def test_one_part_with_the_two_groups_that_peft_always_took(tmp_path):
    a, b = put(tmp_path, [True, False], part=6, rank=4, groups=2)
    x = torch.randn(3, NUM_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner = torch.nn.functional.conv1d((x @ a.double().T)[..., None], b.double(), groups=2)[..., 0]
    expected = torch.cat([inner * 3 / 4, torch.zeros(3, 6)], dim=1)
    torch.testing.assert_close(x @ Adapter.from_pretrained(tmp_path).delta(LAYER).double().T, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [[], [False, False], [1, 0], "q", [True, None]])
def test_a_list_that_names_no_part_is_no_such_adapter_or_refused(tmp_path, value):
    put(tmp_path, [True, True], config={"enable_lora": value})
    with pytest.raises((AdapterCorrupt, AdapterUnsupported)):
        MergedLinear.read(tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"enable_lora": [True, False, True, True]}, {"r": 3}, {"use_rslora": True}, {"bias": "all"}, {"use_dora": True}],
)
def test_what_does_not_fit_the_tensors_or_the_age_is_refused(tmp_path, config):
    put(tmp_path, [True, False, True], config=config)
    with pytest.raises((AdapterCorrupt, AdapterUnsupported)):
        Adapter.from_pretrained(tmp_path)
