"""Compositions and aLoRAs on their way to engines: a sum is its sum, and what an engine cannot do is refused."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

import loraweave as lw
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.report import Report
from loraweave.errors import AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Factors, Task


@pytest.fixture
def pair(tiny_llama, make_adapter, tokenizer):
    tiny_llama.name_or_path = "org/base"
    pool = ExpertPool(
        [replace(make_adapter(tiny_llama, name, seed=seed), base_model="org/base") for seed, name in enumerate("ab")]
    )
    report = Report((), "manual", "", (), 0.0, 0)
    return Composition(tiny_llama, tokenizer, Task([("x", "y")]), pool, {"a": 0.5, "b": -1.0}, "linear", report)


# mlx has to know the architecture, which the composition's model says
@pytest.mark.parametrize("target", ["vllm", "mlx"])
@pytest.mark.own_models
def test_exported_composition_is_the_weighted_sum(pair, tmp_path, target):
    report = pair.export(tmp_path / "out", target=target)
    first, second = pair.pool["a"], pair.pool["b"]
    again = Adapter.from_pretrained(report.folder)
    assert set(again.layers) == set(first.layers)
    for layer in first.layers:
        want = 0.5 * first.delta(layer) - second.delta(layer)
        torch.testing.assert_close(again.delta(layer), want, rtol=1e-5, atol=1e-6)
    assert report.rank == first.rank + second.rank
    assert report.relative_error == 0.0


@pytest.mark.parametrize("target", ["vllm", "gguf", "mlx", "openvino"])
def test_an_adapter_that_would_count_for_every_token_is_refused(tmp_path, target):
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    layers = {"model.layers.0.self_attn.q_proj": Factors(torch.ones(2, 24), torch.ones(24, 2))}
    answer = lw.Adapter("answer", "org/base", layers, invocation=(5, 6))
    with pytest.raises(AdapterUnsupported, match="invocation tokens"):
        answer.export(tmp_path / "out", target=target, base=LlamaConfig(**sizes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["vllm", "kohya", "diffusers"])
def test_a_program_without_a_form_for_fused_experts_is_named(tmp_path, target):
    expert = Factors(torch.ones(2, 4), torch.ones(3, 2), kind="expert")
    adapter = Adapter("a", "base", {"m.experts.down_proj.0": expert})
    with pytest.raises(
        AdapterUnsupported, match=r"is an expert of a fused parameter|updates fused experts.*is_3d_lora_weight"
    ):
        adapter.export(tmp_path / "out", target=target)
