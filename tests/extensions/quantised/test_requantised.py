"""Fused into quantised layers: quantised again where little is lost, live where more is, and the layer itself after it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantised_models import QUANTISED, bias_of, imported, setting
from rounding import assert_near, unit
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from loraweave.composer.composer import Composer
from loraweave.composer.train.adapters import train_adapters
from loraweave.errors import BaseModelUnverified, CompositionError
from loraweave.extend.live import LayerLoss
from loraweave.extensions.quantised import differences, logits_loss
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors, Task

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore")
every_base = pytest.mark.parametrize("name", QUANTISED)
# the 16 values of NF4, from the appendix of QLoRA (Dettmers et al. 2023, arXiv 2305.14314)
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


# a bias that is no parameter is not fused into
PARTS = [
    (name, part)
    for name in QUANTISED
    for part in ("", "base_bias_O", "gain_O")
    if part != "base_bias_O" or name not in ("torch dynamic int8", "hqq", "GPTQ", "AWQ")
]


@pytest.mark.parametrize(("name", "part"), PARTS)
@torch.no_grad()
def test_with_a_limit_of_zero_fused_equals_live(name: str, part: str) -> None:
    model, x, adapter = setting(name, **({part: torch.linspace(-1, 1, 32)} if part else {}))
    engine = Composer(model, [adapter])
    with engine.activate({"a": 0.7}):
        live = model(x)
    base = model(x)
    with engine.fused({"a": 0.7}, max_loss=0.0) as written:
        found = model(x)
        assert written.losses["0"].live
        assert written.losses["0"].loss > 0
    # in fp32 the sums of 64 inputs and three rank rows; in half precision the result
    assert_near(found, live, 64 + 3 if x.dtype == torch.float32 else 1)
    assert torch.equal(model(x), base)


def rounded_to_nf4(values_OI: np.ndarray) -> np.ndarray:
    blocks = values_OI.reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[:, :, None] / scales[:, :, None] - NF4).argmin(axis=2)
    return (NF4[nearest] * scales).reshape(values_OI.shape)


def rounded_to_int8(values_OI: np.ndarray, steps: float = 127) -> np.ndarray:
    scales = np.abs(values_OI).max(axis=1, keepdims=True) / steps
    return np.clip(np.round(values_OI / scales), -128, 127) * scales


def rounded_to_int4(values_OI: np.ndarray) -> np.ndarray:
    # where the update is large, new scales are nearer than the layer's own
    scales = np.abs(values_OI).max(axis=1, keepdims=True) / 7.5
    return np.clip(np.round(values_OI / scales), -8, 7) * scales


ROUNDED = {
    "bitsandbytes nf4": rounded_to_nf4,
    "bitsandbytes int8": rounded_to_int8,
    "torchao int8": lambda values: rounded_to_int8(values, 127.5),
    "torchao int8 inputs too": lambda values: rounded_to_int8(values, 127.5),
    "torchao int4": rounded_to_int4,
}


def int8_products_are_exact() -> bool:
    """False on processors without VNNI, where torch adds up pairs of products of int8 in 16 bits, which saturate."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.T) == 64 * 127**2).all())


@pytest.mark.parametrize("name", ROUNDED)
@torch.no_grad()
def test_above_the_limit_the_weight_is_the_sum_rounded_by_the_librarys_rule(name: str) -> None:
    model, x, adapter = setting(name)
    weight = weight_of(model[0])
    exact = weight + 0.7 * adapter.delta("0").double().numpy()
    expected = ROUNDED[name](exact)
    with Composer(model, [adapter]).fused({"a": 0.7}, max_loss=math.inf) as written:
        found, loss = weight_of(model[0]), written.losses["0"]
        y = model(x).double()
    # nf4's scales are themselves rounded, and a value in the middle of two steps may go either way
    assert (np.abs(found - expected) <= 1e-2 * np.abs(exact).max()).mean() > 0.99
    assert not loss.live
    assert loss.loss == pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(exact - weight), rel=0.02)
    if name == "torchao int8 inputs too" and not int8_products_are_exact():
        return
    linear = nn.functional.linear(x.double(), torch.from_numpy(found), bias_of(model[0]))
    # bitsandbytes' product on CPUs is one of bf16, which rounds both factors and the result; int8 rounds an input to a 255th
    sizes = x.abs().amax(dim=-1, keepdim=True).double() * torch.from_numpy(np.abs(found).sum(axis=1))
    assert bool(((y - linear).abs() <= 3 * unit(torch.bfloat16) * sizes).all())


@torch.no_grad()
def test_a_small_update_of_four_bits_keeps_the_scales_of_the_layer() -> None:
    model, _, adapter = setting("torchao int4")
    weight = model[0].weight
    codes, scales = weight.qdata.double(), weight.scale.double()
    exact = codes * scales + 0.02 * adapter.delta("0").double()
    expected = (exact / scales).round().clamp(-8, 7) * scales
    with Composer(model, [adapter]).fused({"a": 0.02}, max_loss=math.inf) as written:
        assert np.allclose(weight_of(model[0]), expected.numpy(), atol=1e-6)
        share = float((expected - exact).norm() / (exact - codes * scales).norm())
        assert written.losses["0"].loss == pytest.approx(share, rel=1e-3)


def weight_of(module: Any) -> np.ndarray:
    """As the library itself reads it."""
    kind = type(module).__name__
    if kind == "Linear4bit":
        functional = imported("bitsandbytes").functional
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state).double().numpy()  # type: ignore[no-any-return]
    if kind == "Linear8bitLt":
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return (module.weight.data.double() * scales.double()[:, None] / 127).numpy()  # type: ignore[no-any-return]
    return module.weight.dequantize().double().numpy()  # type: ignore[no-any-return]


@every_base
@torch.no_grad()
def test_switching_and_leaving_give_back_the_very_weight(name: str) -> None:
    model, x, adapter = setting(name)
    engine, module = Composer(model, [adapter]), model[0]
    base, weight = model(x), module._parameters.get("weight")
    before = dict(vars(module))
    with engine.fused({"a": 0.7}, max_loss=math.inf) as written:
        first = model(x)
        written.switch({"a": -2.0})
        assert not torch.allclose(model(x), first, atol=1e-2)
        written.switch({"a": 0.7})
        assert torch.equal(model(x), first)
        written.switch({"a": 0.0})
        assert torch.equal(model(x), base)
        assert written.losses == {}
        written.switch({"a": 1.0})
    assert module._parameters.get("weight") is weight
    assert {key: vars(module).get(key) for key in before} == before
    assert torch.equal(model(x), base)
    with pytest.raises(KeyboardInterrupt), engine.fused({"a": 0.7}, max_loss=math.inf):
        raise KeyboardInterrupt
    assert torch.equal(model(x), base)
    assert not module._forward_hooks


def test_a_model_that_never_ran_can_still_be_trained_after_it() -> None:
    model, x, adapter = setting("bitsandbytes nf4")
    model.train()
    with Composer(model, [adapter]).fused({"a": 1.0}, max_loss=math.inf):
        pass
    assert not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False)
    x.requires_grad_()
    model(x).sum().backward()
    assert float(x.grad.abs().max()) > 0


def tiny_base(folder: Path, config: Any) -> Any:
    sizes = {"vocab_size": 58, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def int8_of_torchao() -> TorchAoConfig:
    return TorchAoConfig(imported("torchao.quantization").Int8WeightOnlyConfig())


CONFIGS = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4, scales quantised": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": int8_of_torchao,
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_fused_weight_is_the_one_that_peft_merges(kind: str, tmp_path: Path) -> None:
    imported("torchao.quantization" if kind == "torchao" else "bitsandbytes")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(tiny_base(tmp_path / "base", CONFIGS[kind]()), config).eval()
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    own = tiny_base(tmp_path / "base", CONFIGS[kind]())
    theirs.merge_adapter()
    with Composer(own, [Adapter.from_pretrained(tmp_path / "adapter", name="a")]).fused({"a": 1.0}, max_loss=math.inf):
        for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            merged = weight_of(theirs.base_model.model.get_submodule(layer).base_layer)
            found = weight_of(own.get_submodule(layer))
            # values at the middle of two steps aside
            assert (np.abs(found - merged) <= 1e-5).mean() > 0.995


def test_the_loss_in_logits_is_that_of_the_formula_with_live_updates(tmp_path: Path, tokenizer: Any) -> None:
    imported("bitsandbytes")
    model = tiny_base(tmp_path, CONFIGS["nf4"]())
    torch.manual_seed(1)
    layers = {f"model.layers.{n}.self_attn.q_proj": Factors(torch.randn(2, 64), torch.randn(64, 2)) for n in range(2)}
    engine = Composer(model, [Adapter("a", str(tmp_path), layers)])
    texts, exact, fused = ["a cat.", "two dogs"], [], []
    with torch.no_grad():
        for run, block in ((exact, engine.activate({"a": 1.0})), (fused, engine.fused({"a": 1.0}, max_loss=math.inf))):
            with block as written:
                run += [model(**tokenizer(text, return_tensors="pt")).logits[0].log_softmax(-1) for text in texts]
                stated = None if run is exact else logits_loss(written, tokenizer, texts)
    p, q = torch.cat(exact), torch.cat(fused)
    assert stated.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert stated.other_choice == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).float().mean()))
    assert stated.largest == pytest.approx(float((p - q).abs().max()), rel=1e-3)
    with pytest.raises(CompositionError, match="has ended"):
        logits_loss(written, tokenizer, texts)
    with engine.fused({"a": 1.0}, max_loss=0.0) as written:
        # every layer is live already
        assert logits_loss(written, tokenizer, texts).largest == 0
        with pytest.raises(CompositionError, match="at least one token"):
            logits_loss(written, tokenizer, [])


@pytest.mark.parametrize("limit", [-0.1, math.nan, "a lot"])
def test_a_limit_that_is_no_share_is_refused(limit: Any) -> None:
    model, _, adapter = setting("torchao int8")
    with (
        pytest.raises(CompositionError, match=r"max_loss.*share"),
        Composer(model, [adapter]).fused({"a": 1.0}, max_loss=limit),
    ):
        pass


def test_values_that_are_not_finite_are_refused_and_nothing_has_changed() -> None:
    model, _, adapter = setting("torchao int8")
    own = model[0].weight
    own.data.scale[3] = math.nan
    with pytest.raises(CompositionError, match=r"'0\.weight'.*not be finite"):
        Composer(model, [adapter]).fused({"a": 1.0}, max_loss=math.inf).__enter__()
    assert model[0].weight is own


@torch.no_grad()
def test_what_a_form_cannot_hold_stays_live() -> None:
    model, x, adapter = setting("bitsandbytes int8")
    # which takes values in fp16
    with Composer(model, [adapter]).fused({"a": 1e7}, max_loss=math.inf) as written:
        assert written.losses["0"] == LayerLoss(math.inf, live=True)
        assert bool(model(x).isfinite().all())


def test_another_weight_put_there_meanwhile_is_told() -> None:
    model, _, adapter = setting("torchao int8")
    own = model[0].weight
    with (
        pytest.raises(CompositionError, match="changed by others"),
        Composer(model, [adapter]).fused({"a": 1.0}, max_loss=math.inf),
    ):
        model[0].weight = nn.Parameter(torch.zeros(32, 64))
    assert model[0].weight is own


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if "quantised" not in kind])
def test_an_adapter_that_saw_a_quantised_base_says_what_full_weights_differ_by(
    kind: str, tmp_path: Path, tokenizer: Any
) -> None:
    imported("torchao.quantization" if kind == "torchao" else "bitsandbytes")
    seen = tiny_base(tmp_path, CONFIGS[kind]())
    rows = {"a": Task([("a", "b"), ("c", "d")])}
    settings = {"rank": 2, "steps": 1, "batch_size": 2, "target_modules": ("q_proj", "down_proj"), "progress": False}
    adapter = train_adapters(seen, tokenizer, rows, **settings)["a"]
    assert json.loads(json.dumps(adapter.card["quantization"])) == seen.config.quantization_config.to_dict()
    full = LlamaForCausalLM.from_pretrained(tmp_path)
    layer = "model.layers.1.mlp.down_proj"
    weight, rounded = full.get_submodule(layer).weight.detach().double().numpy(), weight_of(seen.get_submodule(layer))
    expected = np.linalg.norm(weight - rounded) / float(adapter.delta(layer).norm())
    engine = Composer(full, [adapter])
    found = differences(adapter, adapter.card["quantization"], engine.target_layers)
    assert found[layer] == pytest.approx(expected, rel=0.01)
    with (
        pytest.warns(BaseModelUnverified, match=r"'a' was trained on.*differ by.*median of 4 layers"),
        engine.fused({"a": 1.0}),
    ):
        pass
    marks = {
        "cannot be calculated": {"quant_method": "gptq"},
        "cannot be read": {"quant_method": "torchao", "quant_type": 3},
    }
    for said, mark in marks.items():
        other = replace(adapter, card={"quantization": mark})
        with pytest.warns(BaseModelUnverified, match=said), Composer(full, [other]).fused({"a": 1.0}):
            pass


@pytest.mark.slow
def test_layers_of_hqq_and_gptqmodel_pass_every_test_of_quantised_layers_in_their_own_environment():
    files = ["tests/composer/model/test_quantised.py", "tests/extensions/quantised/test_requantised.py"]
    chosen = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-m", "not slow", "-k", "hqq or GPTQ or AWQ"]
    done = subprocess.run(
        [engines.interpreter("quantised"), "-W", "ignore", "-m", "pytest", *chosen, *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    # none is skipped
    assert re.search(r"^\d+ passed, \d+ deselected", done.stdout.splitlines()[-1]), done.stdout[-500:]
