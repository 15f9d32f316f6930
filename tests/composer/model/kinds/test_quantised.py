"""Quantised bases: adapters mix live on the layer's own output, and what needs the weights themselves is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import Make
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

pytestmark = pytest.mark.filterwarnings("ignore")


def imported(name: str) -> Any:
    """The package, whatever it warns of while it is loaded; the test is skipped without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def _torchao(config: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    quantization = imported("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model


def _bitsandbytes(kind: str, **options: Any) -> nn.Module:
    layer = getattr(imported("bitsandbytes").nn, kind)(64, 32, **options)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    return nn.Sequential(layer).to("cpu")


def _torch_dynamic() -> nn.Module:
    quantization = imported("torch.ao.quantization")
    return quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 32)), {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


QUANTISED: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
    "torchao int8": (lambda: _torchao("Int8WeightOnlyConfig", torch.float32), torch.float32),
    "torchao int8 of bf16": (lambda: _torchao("Int8WeightOnlyConfig", torch.bfloat16), torch.bfloat16),
    "torchao int8 inputs too": (lambda: _torchao("Int8DynamicActivationInt8WeightConfig", torch.float32), torch.float32),
    "torchao int4": (lambda: _torchao("IntxWeightOnlyConfig", torch.float32, weight_dtype=torch.int4), torch.float32),
    "bitsandbytes int8": (lambda: _bitsandbytes("Linear8bitLt", has_fp16_weights=False), torch.float32),
    "bitsandbytes nf4": (lambda: _bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32), torch.float32),
    "torch dynamic int8": (_torch_dynamic, torch.float32),
}
every_base = pytest.mark.parametrize("name", QUANTISED)


def setting(name: str, **parts: Tensor) -> tuple[nn.Module, Tensor, Adapter]:
    make, dtype = QUANTISED[name]
    torch.manual_seed(0)
    model = make().eval()
    factors = Factors(torch.randn(3, 64) * 0.3, torch.randn(32, 3) * 0.3, **parts)
    return model, torch.randn(2, 5, 64).to(dtype), Adapter("a", "tiny", {"0": factors})


def bias_of(module: nn.Module) -> Tensor:
    bias: Any = module.bias
    return (bias if isinstance(bias, Tensor) else bias()).detach().double()


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
