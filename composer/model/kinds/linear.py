"""Linear layers: torch.nn.Linear, also quantised ones, and transformers' Conv1D, which stores its weight as (I, O)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from loraweave.composer.model.kinds import _kind
from loraweave.composer.model.kinds._kind import Shape, by_row
from loraweave.types import Kind

name: Kind = "linear"
modules = "torch.nn.Linear and transformers' Conv1D"
# where classes are that are linear layers, and no torch.nn.Linear: quantize_dynamic's, HQQ's, GPTQ's and AWQ's
_QUANTISED = ("torch.ao.nn.quantized.dynamic.modules.linear", "hqq.core.quantize", "gptqmodel.nn_modules.qlinear")

inputs, rows, put_back = _kind.inputs_by_row, _kind.rows, _kind.put_back


def shape(module: nn.Module) -> Shape | None:
    """(O, I) of a linear layer; None for any other module."""
    if isinstance(module, Conv1D):
        return Shape(int(module.nf), int(module.weight.shape[0]), transposed=True)
    if isinstance(module, nn.Linear) or type(module).__module__.startswith(_QUANTISED):
        return Shape(int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    return None


def refusal(module: Any) -> str:
    """Not exact is a layer whose forward is more than W x + bias."""
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward and not _is_plain(module):
        return "whose forward is its own, and is not W x + bias"
    return ""


def project(module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
    """hidden_BTS = x a^T."""
    return functional.linear(by_row(x).to(a_SI.dtype), a_SI)


def _is_plain(module: nn.Linear) -> bool:
    """Whether the forward of a class of its own gives W x + bias for a random x; True where W is no plain matrix."""
    weight, bias = module.weight, module.bias
    stored = weight.shape == (module.out_features, module.in_features)
    if weight.is_meta or not stored or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, module.in_features, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        y = type(module).forward(module, x)
        expected = functional.linear(x, weight, bias)
    return _kind.is_near(y, expected, atol=1e-2 * float(expected.abs().max()))
