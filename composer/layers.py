"""What can be a target layer: the linear layers of a model, seen as one weight (O, I) whatever their storage."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from loraweave.errors import CompositionError, LayerMismatch
from loraweave.hub import algebra
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """A linear layer under its module path. `transposed` says that its weight is stored as (I, O)."""

    name: str
    module: nn.Module
    num_outputs: int
    num_inputs: int
    transposed: bool

    def parameter(self, part: str) -> Tensor | None:
        """The tensor "weight" or "bias" as it is now; None where the layer has none, or computes it on the way."""
        found = getattr(self.module, part, None)
        return found if isinstance(found, Tensor) else None

    def dense_weight_OI(self) -> Tensor:
        """The weight as (O, I). Raises CompositionError where it is not a plain matrix (quantised, packed, meta)."""
        weight = self.parameter("weight")
        stored = (self.num_inputs, self.num_outputs) if self.transposed else (self.num_outputs, self.num_inputs)
        if weight is None or weight.is_meta or not is_floating(weight.dtype) or tuple(weight.shape) != stored:
            what = "no tensor" if weight is None else f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
            raise CompositionError(
                f"the weight of layer {self.name!r} ({type(self.module).__name__}) is {what}, not a matrix of "
                f"floating point numbers {stored}; activate() plain LoRA adapters on it, or load the model unquantised"
            )
        return weight.T if self.transposed else weight


def is_floating(dtype: torch.dtype) -> bool:
    """Whether one can calculate in this dtype; 8-bit floats only store."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def linear_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """(O, I, whether the weight is stored as (I, O)) of a linear layer; None for any other module."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.weight.shape[0]), True
    if isinstance(module, nn.Linear):
        return int(module.out_features), int(module.in_features), False
    return None


def target_layer(modules: Mapping[str, nn.Module], name: str, factors: Factors, expert: str) -> TargetLayer:
    """The layer that `factors` update; `modules` is the model's named_modules().

    Raises LayerMismatch, naming expert and layer, for a layer that the model has not, that is not linear, whose forward
    is bypassed by its owner, or whose shape is another one.
    """
    module = modules.get(name)
    if module is None:
        close = difflib.get_close_matches(name, modules, n=1)
        hint = f"; the nearest is {close[0]!r}" if close else ""
        raise LayerMismatch(f"expert {expert!r} updates layer {name!r}, which the model does not have{hint}")
    kind = type(module).__name__
    if factors.kind != "linear":
        raise LayerMismatch(
            f"expert {expert!r} updates layer {name!r} ({kind}) with factors of kind {factors.kind!r}; only linear layers "
            "can be composed: take an adapter that leaves this layer alone"
        )
    # MultiheadAttention reads the weight of this one and never calls it, so that an update would be lost without a word
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise LayerMismatch(
            f"expert {expert!r} updates layer {name!r} ({kind}), whose forward its attention module never calls; "
            "take an adapter that leaves this layer alone"
        )
    shape = linear_shape(module)
    if shape is None:
        raise LayerMismatch(
            f"expert {expert!r} updates layer {name!r}, which is a {kind}; only torch.nn.Linear and transformers' Conv1D "
            "can be composed"
        )
    num_outputs, num_inputs, transposed = shape
    found = (int(factors.b_OR.shape[0]), int(factors.a_RI.shape[1]))
    if found != (num_outputs, num_inputs):
        raise LayerMismatch(
            f"expert {expert!r} updates layer {name!r} with shape (O, I) = {found}, "
            f"but the model's {kind} has {(num_outputs, num_inputs)}"
        )
    return TargetLayer(name, module, num_outputs, num_inputs, transposed)


def bound(adapter: Adapter, layers: Mapping[str, TargetLayer]) -> Mapping[str, Factors]:
    """The adapter's factors with all that depends on the base layers resolved (DoRA's magnitude, a trained bias)."""
    factors = dict(adapter.layers)
    for name, part in factors.items():
        if not part.bound:
            with torch.inference_mode(False), torch.no_grad():
                layer = layers[name]
                factors[name] = algebra.bind(_on_cpu(part), layer.dense_weight_OI().cpu(), _cpu(layer.parameter("bias")))
    return factors


def _on_cpu(factors: Factors) -> Factors:
    moved: dict[str, Any] = {part: tensor.cpu() for part, tensor in factors.tensors().items()}
    return replace(factors, **moved)


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()
