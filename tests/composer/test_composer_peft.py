"""Parity with the installed peft, where it is right, and of live, fused and merged with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import Make, logits
from tiny_models import model_inputs as inputs
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.composer.merge.merge import merge
from loraweave.hub.adapter import Adapter

KINDS = ["llama", "gpt2", "t5", "bert"]


def as_peft(model: nn.Module, adapters: Sequence[Adapter]) -> Any:
    """The model as a PeftModel with these adapters, whose scale is 1."""
    from peft import LoraConfig, get_peft_model

    wrapped: Any = None
    for adapter in adapters:
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.rank,
            target_modules=sorted(adapter.layers),
            fan_in_fan_out=any("h.0" in layer for layer in adapter.layers),
        )
        own_name = f"peft {adapter.name}"
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=own_name)
        else:
            wrapped.add_adapter(own_name, config)
        with torch.no_grad():
            for layer, factors in adapter.layers.items():
                module = wrapped.base_model.model.get_submodule(layer)
                module.lora_A[own_name].weight.copy_(factors.a_RI)
                module.lora_B[own_name].weight.copy_(factors.b_OR)
    return wrapped.eval()


# what peft itself calls by a name that transformers is going to drop
quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@quiet_peft
def test_one_mixture_per_row_equals_pefts_mixed_batch(make_model: Make, make_adapter: Make) -> None:
    model = make_model("llama")
    adapters = [make_adapter(model, "a", rank=2, seed=1), make_adapter(model, "b", rank=5, seed=2)]
    theirs = as_peft(make_model("llama"), adapters)
    with torch.no_grad():
        expected = theirs(**inputs("llama"), adapter_names=["peft b", "__base__", "peft a"]).logits
    with Composer(model, adapters).activate([{"b": 1.0}, None, {"a": 1.0}]):
        assert torch.allclose(logits(model, inputs("llama")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_live_fused_and_merged_agree(kind: str, make_model: Make, make_adapters: Make) -> None:
    model = make_model(kind)
    adapters = make_adapters(model, kind)
    engine = Composer(model, adapters)
    with engine.activate({"a": 0.7, "b": -0.4, "c": 1.3}):
        live = logits(model, inputs(kind))
    with engine.fused({"a": 0.7, "b": -0.4, "c": 1.3}):
        fused = logits(model, inputs(kind))
    with Composer(model, [merge(adapters, [0.7, -0.4, 1.3], name="m")]).activate({"m": 1.0}):
        merged = logits(model, inputs(kind))
    scale = float(live.abs().max())
    assert float((live - fused).abs().max()) <= 1e-5 * scale
    assert float((live - merged).abs().max()) <= 1e-5 * scale


@quiet_peft
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_live_mixture_equals_the_merged_adapter_reloaded_by_peft(
    kind: str, tmp_path: Any, make_model: Make, make_adapters: Make
) -> None:
    from peft import PeftModel

    model = make_model(kind)
    adapters = make_adapters(model, kind)
    with Composer(model, adapters).activate({"a": 0.7, "b": -0.4, "c": 1.3}):
        live = logits(model, inputs(kind))
    folder = merge(adapters, [0.7, -0.4, 1.3], name="m").save_pretrained(tmp_path / "m")
    reloaded = PeftModel.from_pretrained(make_model(kind), str(folder)).eval()
    assert float((live - logits(reloaded, inputs(kind))).abs().max()) <= 1e-5 * float(live.abs().max())
