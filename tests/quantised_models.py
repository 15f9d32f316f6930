"""Single layers that libraries quantised, each in its own form, of those libraries that are installed.

HQQ and gptqmodel are in an environment of their own (tests/engines.py); tests/composer/model/test_quantised.py runs these
tests there.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


def imported(name: str) -> Any:
    """Return the module, whatever it warns of while it is loaded; skip the test where it is not installed."""
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


def _hqq() -> nn.Module:
    quantize = imported("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    return nn.Sequential(quantize.HQQLinear(nn.Linear(64, 32), config, compute_dtype=torch.float32, device="cpu"))


def _gptqmodel(kind: str, name: str) -> nn.Module:
    layer = getattr(imported(f"gptqmodel.nn_modules.qlinear.{kind}"), name)
    linear = nn.Linear(64, 32)
    scales_OG = linear.weight.data.unflatten(1, (2, 32)).abs().amax(dim=-1) / 7
    settings = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "bias": True, "pack_dtype": torch.int32}
    made = layer(in_features=64, out_features=32, register_buffers=True, **settings)
    made.pack(linear, scales_OG, torch.full((32, 2), 8.0), torch.arange(64, dtype=torch.int32) // 32)
    made.post_init()
    return nn.Sequential(made)


QUANTISED: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
    "torchao int8": (lambda: _torchao("Int8WeightOnlyConfig", torch.float32), torch.float32),
    "torchao int8 of bf16": (lambda: _torchao("Int8WeightOnlyConfig", torch.bfloat16), torch.bfloat16),
    "torchao int8 inputs too": (lambda: _torchao("Int8DynamicActivationInt8WeightConfig", torch.float32), torch.float32),
    "torchao int4": (lambda: _torchao("IntxWeightOnlyConfig", torch.float32, weight_dtype=torch.int4), torch.float32),
    "bitsandbytes int8": (lambda: _bitsandbytes("Linear8bitLt", has_fp16_weights=False), torch.float32),
    "bitsandbytes nf4": (lambda: _bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32), torch.float32),
    "torch dynamic int8": (_torch_dynamic, torch.float32),
}
# in an environment of their own
APART = {
    "hqq": (_hqq, torch.float32),
    "GPTQ": (lambda: _gptqmodel("torch", "TorchLinear"), torch.bfloat16),
    "AWQ": (lambda: _gptqmodel("torch_awq", "AwqTorchLinear"), torch.bfloat16),
}
if importlib.util.find_spec("gptqmodel"):
    QUANTISED = APART


def setting(name: str, **parts: Tensor) -> tuple[nn.Module, Tensor, Adapter]:
    make, dtype = QUANTISED[name]
    torch.manual_seed(0)
    model = make().eval()
    factors = Factors(torch.randn(3, 64) * 0.3, torch.randn(32, 3) * 0.3, **parts)
    return model, torch.randn(2, 5, 64).to(dtype), Adapter("a", "tiny", {"0": factors})


def bias_of(module: nn.Module) -> Tensor:
    bias: Any = module.bias
    return (bias if isinstance(bias, Tensor) else bias()).detach().double()
