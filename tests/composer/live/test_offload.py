"""Models whose weights accelerate keeps elsewhere: they are on the meta device but for the moment in which a layer runs."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from live_models import IDS, logits
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

EVERY = ("q_proj", "down_proj", "lm_head")


def _by_cpu(model, folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def _by_disk(model, folder):
    disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return model


def _by_device_map(model, folder):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


offloading = pytest.mark.parametrize("offload", [_by_cpu, _by_disk, _by_device_map])


@pytest.fixture
def adapters(make_adapter, tiny_llama):
    embedding = Factors(torch.randn(2, 61), torch.randn(16, 2), kind="embedding")
    first = make_adapter(tiny_llama, "a", targets=EVERY, seed=1)
    return [
        Adapter("a", "tiny", {**first.layers, "model.embed_tokens": embedding}),
        make_adapter(tiny_llama, "b", targets=EVERY, seed=2, gain=True),
    ]


def test_adapters_and_routers_learn_the_same_over_the_offloaded_layers_of_a_device_map(
    make_model, make_adapter, tiny_llama, tokenizer, tmp_path
):
    rows = [{"input_ids": [5, 9, 11, 30, 7], "labels": [-100, -100, 11, -100, 7]}] * 2
    texts = {"same": [("ab", "ab"), ("c", "c")]}
    found = []
    for model in (make_model("llama"), _by_device_map(make_model("llama"), tmp_path)):
        engine = Composer(model, [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("ab")])
        torch.manual_seed(0)
        router = lw.router("mole", engine.pool)
        router.fit(engine, rows, steps=2, batch_size=2, warmup=0, progress=False)
        trained = lw.train_adapters(model, tokenizer, texts, rank=2, steps=2, batch_size=2, progress=False)
        found.append((router.state_dict(), trained["same"].hash))
    assert found[0][1] == found[1][1]
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-4, atol=1e-6)


@offloading
def test_offloaded_layers_mix_live_and_are_offloaded_again(offload, make_model, adapters, tmp_path):
    rows = [{"a": 1.0}, {"a": 0.5, "b": -0.5}, None]
    plain = make_model("llama")
    with Composer(plain, adapters).activate(rows):
        expected = logits(plain)
    model = offload(make_model("llama"), tmp_path)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    base = logits(model)
    assert torch.equal(base, logits(plain))
    with Composer(model, adapters).activate(rows):
        assert torch.equal(logits(model), expected)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert torch.equal(logits(model), base)


@offloading
def test_fusing_into_offloaded_layers_is_refused(offload, make_model, adapters, tmp_path):
    model = offload(make_model("llama"), tmp_path)
    base = logits(model)
    with pytest.raises(CompositionError, match=r"on meta.*activate\(\)"), Composer(model, adapters).fused({"a": 1.0}):
        pass
    assert torch.equal(logits(model), base)


def test_what_needs_an_offloaded_layers_own_values_is_refused_before_anything_runs():
    model = cpu_offload(nn.Sequential(nn.Linear(4, 3)), execution_device=torch.device("cpu"))
    factors = {"a_RI": torch.ones(1, 4), "b_OR": torch.ones(3, 1)}
    Composer(model, [Adapter("a", "tiny", {"0": Factors(**factors)})])
    for part in ("magnitude_O", "base_bias_O", "gain_O"):
        adapter = Adapter("a", "tiny", {"0": Factors(**factors, **{part: torch.ones(3)})})
        with pytest.raises(CompositionError, match=r"'a' has a gain.*layer '0'.*offloaded"):
            Composer(model, [adapter])


def test_an_offloaded_embedding_keeps_its_scale():
    torch.manual_seed(0)
    update = Factors(torch.randn(2, 61), torch.randn(16, 2), kind="embedding")
    module = Gemma3TextScaledWordEmbedding(61, 16, 0, embed_scale=4.0)
    with torch.no_grad():
        expected = module(IDS) + 4.0 * (update.b_OR @ update.a_RI).T[IDS]
    model = cpu_offload(nn.Sequential(module), execution_device=torch.device("cpu"))
    with Composer(model, [Adapter("a", "tiny", {"0": update})]).activate({"a": 1.0}), torch.no_grad():
        assert torch.allclose(model(IDS), expected, rtol=1e-5, atol=1e-5)
