"""The script that stores a pool in fewer bytes: what it keeps, what it says was lost, and that peft reads it alike."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import loraweave as lw

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WIDTHS = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.self_attn.v_proj": (8, 16)}
# half of the last place of a number with three bits after the point, in each of two factors
ROUNDED = (1 + 2**-4) ** 2 - 1


@pytest.fixture(scope="module")
def store_pool():
    spec = importlib.util.spec_from_file_location("store_pool", EXAMPLES / "store_pool.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapter(strengths: dict[str, list[float]]) -> lw.Adapter:
    """An update whose layers have these singular values."""
    draw = torch.Generator().manual_seed(0)
    layers = {}
    for layer, values in strengths.items():
        num_out, num_in = WIDTHS[layer]
        a_RI, b_OR = (torch.linalg.qr(torch.randn(size, len(values), generator=draw))[0] for size in (num_in, num_out))
        layers[layer] = lw.Factors(a_RI.T.contiguous(), b_OR * torch.tensor(values))
    return lw.Adapter("stored", "some/base", layers, card={"description": "what it does"})


def test_a_whole_update_is_off_by_the_rounding_of_its_factors_alone(store_pool, tmp_path):
    whole = adapter({layer: [1e-3, 1e-4] for layer in WIDTHS})
    error = store_pool.store(whole, tmp_path / "stored", 1000)
    again = lw.Adapter.from_pretrained(tmp_path / "stored")
    assert 0 < error < ROUNDED * 2**0.5
    assert error == pytest.approx(store_pool.distance(again, whole))
    assert again.card["stored"]["relative_error"] == pytest.approx(error, abs=5e-5)
    assert again.card["description"] == "what it does"
    assert "Stored as: float8_e4m3fn" in (tmp_path / "stored" / "README.md").read_text()


def test_components_of_most_energy_a_byte_stay_and_each_layer_keeps_one(store_pool, tmp_path):
    # a component of q takes 32 bytes and one of v 24
    wide, narrow = WIDTHS
    pool = adapter({wide: [1.0, 0.5, 0.4, 0.1], narrow: [0.01, 0.005]})
    store_pool.store(pool, tmp_path / "stored", 32 * 3 + 24 + 31)
    ranks = {layer: factors.rank for layer, factors in lw.Adapter.from_pretrained(tmp_path / "stored").layers.items()}
    assert ranks == {wide: 3, narrow: 2}  # 0.1 squared over 32 is more, but needs one byte more than are left
    stored = load_file(tmp_path / "stored" / "adapter_model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.float8_e4m3fn}
    assert sum(values.numel() for values in stored.values()) <= 32 * 3 + 24 + 31


# of a name that peft asks transformers for
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_reads_the_same_update(store_pool, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    store_pool.store(adapter({layer: [0.3, 0.02, 0.01] for layer in WIDTHS}), tmp_path / "stored", 150)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=9)
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM(config), tmp_path / "stored")
    ours = lw.Adapter.from_pretrained(tmp_path / "stored")
    for layer in WIDTHS:
        theirs = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default")
        # a product of three terms in fp32
        torch.testing.assert_close(theirs, ours.delta(layer), rtol=0, atol=3 * 2**-24)
