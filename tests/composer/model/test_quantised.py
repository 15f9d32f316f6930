"""Quantised bases: adapters mix live on the layer's own output, and what needs the weights themselves is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantised_models import QUANTISED, bias_of, imported, setting
from tiny_models import Make
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

pytestmark = pytest.mark.filterwarnings("ignore")

every_base = pytest.mark.parametrize("name", QUANTISED)


@every_base
@pytest.mark.parametrize("part", ["", "base_bias_O", "gain_O"])
@torch.no_grad()
def test_live_adds_the_update_with_its_bias_and_gain_to_the_quantised_layers_output(part: str, name: str) -> None:
    model, x, adapter = setting(name, **({part: torch.linspace(-1, 1, 32)} if part else {}))
    base, factors = model(x), adapter.layers["0"]
    change = x.double() @ factors.a_RI.double().T @ factors.b_OR.double().T
    if factors.base_bias_O is not None:
        change += factors.base_bias_O.double() - bias_of(model[0])
    if factors.gain_O is not None:
        change += factors.gain_O.double() * (base.double() - bias_of(model[0]))
    with Composer(model, [adapter]).activate([{"a": 0.5}, None]):
        found = model(x)
    assert found.dtype == base.dtype == x.dtype
    expected = base[0].double() + 0.5 * change[0]
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    assert torch.allclose(found[0].double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(found[1], base[1])
    assert torch.equal(model(x), base)


@every_base
def test_fusing_and_dora_which_need_the_weights_are_refused(name: str) -> None:
    model, x, adapter = setting(name)
    base = model(x)
    with (
        pytest.raises(CompositionError, match=r"weight of layer '0'.*activate\(\) plain LoRA"),
        Composer(model, [adapter]).fused({"a": 1.0}),
    ):
        pass
    model, x, adapter = setting(name, magnitude_O=torch.ones(32))
    with pytest.raises(CompositionError, match=r"weight of layer '0'.*load the model unquantised"):
        Composer(model, [adapter])
    assert torch.equal(model(x), base)


def test_a_gradient_passes_through_the_update_of_a_quantised_layer() -> None:
    model, x, adapter = setting("torch dynamic int8")
    factors = adapter.layers["0"]
    x = x.requires_grad_()
    with Composer(model, [adapter]).activate({"a": 1.0}):
        # torch's own quantised product has no gradient, so that what arrives is the update's
        model(x).sum().backward()
    expected = (torch.ones(32) @ factors.b_OR @ factors.a_RI).expand_as(x)
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_that_torchao_quantised_equals_peft_on_it(make_model: Make, tmp_path: Path) -> None:
    quantization = imported("torchao.quantization")

    def model() -> nn.Module:
        made = make_model("llama")
        quantization.quantize_(made.model.layers, quantization.Int8WeightOnlyConfig())
        return made

    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj", "embed_tokens"])
    theirs = get_peft_model(model(), config).eval()  # type: ignore[arg-type]
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    own, ids = model(), torch.arange(3, 24).view(3, 7)
    with Composer(own, {"a": Adapter.from_pretrained(tmp_path)}).activate({"a": 1.0}):
        found = own(input_ids=ids).logits
    expected = theirs(input_ids=ids).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@torch.no_grad()
def test_a_base_read_from_quantised_gguf_is_exact_on_the_dequantised_weights(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf_models import write_model

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    made, path = LlamaForCausalLM(LlamaConfig(**sizes)), "model.layers.0.mlp.down_proj"
    write_model(tmp_path / "m.gguf", made, "llama", quantised=kind)
    [stored] = [each for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors if each.name == "blk.0.ffn_down.weight"]
    weight_OI = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type)).double()
    assert not torch.allclose(weight_OI, made.get_submodule(path).weight.double(), atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    factors, seen = Factors(torch.randn(2, 64), torch.randn(32, 2)), []
    base.get_submodule(path).register_forward_hook(lambda module, args, y: seen.append((args[0].double(), y.double())))
    engine, ids = Composer(base, [Adapter("a", "tiny", {path: factors})]), torch.arange(3, 17).view(2, 7)
    plain = base(input_ids=ids).logits
    with engine.activate([{"a": 0.7}, None]):
        base(input_ids=ids)
    with engine.fused({"a": 0.7}):
        base(input_ids=ids)
    sums = [weight_OI, weight_OI + 0.7 * factors.b_OR.double() @ factors.a_RI.double()]
    (x_live, live), (x_fused, fused) = seen[1:]
    for x, y, weight in ((x_live[0], live[0], sums[1]), (x_live[1], live[1], sums[0]), (x_fused, fused, sums[1])):
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(base(input_ids=ids).logits, plain)
