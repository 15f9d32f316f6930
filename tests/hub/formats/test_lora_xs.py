"""LoRA-XS as its authors' code saves it (github.com/MohammadrezaBanaei/LoRA-XS): a linear layer between A and B."""

import peft
import pytest
import torch
from peft_models import TARGETS, save
from safetensors.torch import load_file, save_file

from loraweave.errors import AdapterCorrupt
from loraweave.hub.adapter import Adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=[".default_lora_latent_mapping.weight", "_lora_latent_mapping.weight"])
def stored(request, tmp_path):
    """(folder, middle matrices, the LoRA without them): both spellings that versions of peft write."""
    save(peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, rank_pattern={"last": 2}), tmp_path)
    plain = Adapter.from_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    middles = {name: torch.randn(factors.rank, factors.rank) for name, factors in plain.layers.items()}
    extra = {f"base_model.model.{name}{request.param}": middle for name, middle in middles.items()}
    save_file({**load_file(path), **extra}, path)
    return tmp_path, middles, plain


def test_the_middle_matrix_stands_between_a_and_b(stored):
    folder, middles, plain = stored
    adapter = Adapter.from_pretrained(folder)
    for name, factors in plain.layers.items():
        wanted = factors.b_OR @ middles[name] @ factors.a_RI
        torch.testing.assert_close(adapter.delta(name), wanted)
        assert adapter.layers[name].rank == factors.rank


def test_a_layer_without_its_middle_matrix_is_refused(stored):
    folder, _, _ = stored
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "first" not in key or "latent" not in key}, path)
    with pytest.raises(AdapterCorrupt, match="'first' lacks the tensor 'default_lora_latent_mapping"):
        Adapter.from_pretrained(folder)
