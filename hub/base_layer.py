"""A base model's layer as one weight matrix (outputs, inputs), whatever kind of module holds it."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraweave.errors import AdapterUnsupported, LayerMismatch
from loraweave.types import Factors, Kind


@dataclass(frozen=True, eq=False)
class BaseLayer:
    """A linear layer, embedding or convolution of a base model; its weight is read only when it is used."""

    name: str
    module: nn.Module
    num_outputs: int
    num_inputs: int
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    transposed: bool = False

    @cached_property
    def weight_OI(self) -> Tensor:
        """The weight (O, I) in float64 on the CPU. Raises AdapterUnsupported if it is not a plain matrix of floats."""
        weight: Any = getattr(self.module, "weight", None)
        size = self.num_outputs * self.num_inputs
        what = f"{weight.dtype} {tuple(weight.shape)} on {weight.device}" if isinstance(weight, Tensor) else "no tensor"
        if what == "no tensor" or weight.is_meta or not weight.is_floating_point() or weight.numel() != size:
            raise AdapterUnsupported(
                f"the weight of the base layer {self.name!r} ({type(self.module).__name__}) is {what}; its values are "
                "needed, so load the base model unquantised"
            )
        dense: Tensor = weight.detach().cpu().double()
        return dense.T if self.transposed else dense.flatten(1)

    @property
    def bias_O(self) -> Tensor | None:
        """The bias in float64 on the CPU, None for a layer without one. Raises AdapterUnsupported on the meta device."""
        bias = getattr(self.module, "bias", None)
        if bias is not None and bias.is_meta:
            raise AdapterUnsupported(
                f"the bias of the base layer {self.name!r} is on the meta device; its values are needed"
            )
        return None if bias is None else bias.detach().cpu().double()


def base_layer(modules: Mapping[str, nn.Module], name: str, asker: str) -> BaseLayer:
    """Return the layer of that name. Raises LayerMismatch, naming `asker`, if it is missing or has no weight matrix."""
    module = modules.get(name)
    if module is None:
        raise missing_layer(asker, name, modules)
    layer = as_base_layer(name, module)
    if layer is None:
        raise LayerMismatch(
            f"{asker} updates layer {name!r}, a {type(module).__name__}; only linear layers, embeddings and convolutions "
            "without groups have an update as factors"
        )
    return layer


class ExpertMatrix(NamedTuple):
    """One expert of a fused parameter: `module.<parameter>[number]`, a matrix (O, I), or (I, O) if it is `transposed`."""

    path: str
    module: nn.Module
    parameter: str
    number: int
    num_outputs: int
    num_inputs: int
    transposed: bool


def expert_matrix(modules: Mapping[str, nn.Module], name: str, factors: Factors | None, asker: str) -> ExpertMatrix:
    """Return the expert's matrix of the layer `<path>.<parameter>.<number>`, marked transposed if the module says so.

    Raises LayerMismatch, naming `asker`, if the model has no such matrix, or `factors` are given and have another size.
    """
    path, parameter, number = (["", "", *name.rsplit(".", 2)])[-3:]
    module, place = modules.get(path), f"parameter {parameter!r} of {path!r}"
    if module is None:
        raise missing_layer(asker, path, modules)
    tensor = module._parameters.get(parameter)
    if tensor is None or tensor.ndim != 3:
        what = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
        raise LayerMismatch(
            f"{asker} updates an expert of {place}, a {type(module).__name__}, which has {what}, not (E, O, I)"
        )
    transposed = bool(getattr(module, "is_transposed", False))
    count, *sides = tensor.shape
    num_outputs, num_inputs = reversed(sides) if transposed else sides
    sizes = num_outputs, num_inputs
    shape = sizes if factors is None else (factors.b_OR.shape[0], factors.a_RI.shape[1])
    if number not in map(str, range(count)) or shape != sizes:
        raise LayerMismatch(
            f"{asker} updates expert {number} of {place} with shape (O, I) = {shape}, but the model has {count} experts of "
            f"{sizes}; was the adapter made for another base model?"
        )
    return ExpertMatrix(path, module, parameter, int(number), *sizes, transposed)


def missing_layer(asker: str, name: str, known: Iterable[str]) -> LayerMismatch:
    """Return the error for an update of a layer that the model lacks; it names the nearest layer."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; the nearest is {close[0]!r}" if close else ""
    return LayerMismatch(f"{asker} updates layer {name!r}, which the model does not have{hint}")


def as_base_layer(name: str, module: nn.Module) -> BaseLayer | None:
    """Return the module as a layer with one weight matrix, or None if it is not one."""
    match module:
        case Conv1D():
            return BaseLayer(name, module, int(module.nf), int(module.nx), transposed=True)
        case nn.Linear():
            return BaseLayer(name, module, int(module.out_features), int(module.in_features))
        case nn.Embedding():
            sizes = int(module.embedding_dim), int(module.num_embeddings)
            return BaseLayer(name, module, *sizes, kind="embedding", transposed=True)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if module.groups == 1:
            kernel = tuple(int(size) for size in module.kernel_size)
            inputs = int(module.weight[0].numel())
            return BaseLayer(name, module, int(module.out_channels), inputs, kind="conv", kernel=kernel)
    return None
