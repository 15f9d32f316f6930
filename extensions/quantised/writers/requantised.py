"""A quantised layer in a fused mixture: quantised again with its update, or unchanged with the update added to its output.

    W      what the layer's own forward makes of unit vectors, whatever its storage
    V      W (1 + gain) + update
    Q(V)   quantised again by the library that made the layer's weight, with that weight's own settings
    loss   |V' - V| / |V - W| in Frobenius norms, V' read as W is; 1 where the whole update is rounded away

What `Q` writes is another object, and the layer's own comes back as the object that it was, bit for bit. The same is what
peft's `merge` does to a quantised layer, without a measure of what is lost (see
`tests/extensions/quantised/test_requantised.py`).
"""

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import Adapter, CompositionError, Factors
from loraweave.extend import TargetLayer
from loraweave.extend.live import LayerLoss, WeightWriter, find_places
from loraweave.extend.merging import DenseUpdate
from loraweave.extend.models import is_floating
from loraweave.extensions.quantised.losses import full_weight_warnings, is_quantised

# the number of unit vectors in one call of a layer
BLOCK = 256
# attributes beside the weight in which bitsandbytes' modules keep its state
_BESIDE = ("state", "quant_state")
# (device of a layer's weight, dtype of its inputs)
Place = tuple[torch.device, torch.dtype]


class Requantised(WeightWriter):
    """A writer that `Fused` uses for the weight of a quantised layer.

    `loss` is the latest update's; above `max_loss` the weight stays as it is and a hook adds the update to the output.
    """

    # no copy of the original is made
    slot = torch.empty(0)

    @classmethod
    def takes(cls, layer: TargetLayer) -> bool:
        return is_quantised(layer)

    @classmethod
    def warnings(cls, adapters: Mapping[str, Adapter], layers: Mapping[str, TargetLayer]) -> list[str]:
        return full_weight_warnings(adapters, layers)

    def __init__(self, model: nn.Module, layer: TargetLayer, max_loss: float) -> None:
        self.layer = layer
        self.loss = LayerLoss(0.0, live=False)
        self._is_home = True
        self._max_loss = max_loss
        self._place = _place(model, layer)
        self._own = _attributes(layer.module)
        self._new: dict[str, Any] | None = None
        self._added: _Added | None = None
        self._hook: Any = None

    @property
    def name(self) -> str:
        return f"{self.layer.name}.weight"

    @property
    def at_home(self) -> bool:
        return self._is_home

    @torch.no_grad()
    def prepare(self, update: Factors | DenseUpdate, scratch: object = None) -> None:
        """Make the weight that `exchange` puts into the layer, and its `loss`; the layer itself is not changed yet.

        Raises CompositionError for values that are not finite.
        """
        module = self.layer.module
        self._added, self._new = _Added(update, self._place[0]), None
        base_OI = read_weight(self.layer, module, self._place)
        exact_OI = base_OI + self._added.change(base_OI)
        if not bool(exact_OI.isfinite().all()):
            raise CompositionError(
                f"cannot fuse into {self.name!r}: its new values would not be finite; use smaller weights"
            )
        loss, twin = math.inf, quantised_again(module, exact_OI)
        if twin is not None:
            error = read_weight(self.layer, twin, self._place) - exact_OI
            size = float(torch.linalg.vector_norm(exact_OI - base_OI))
            # NaN if the quantised form cannot hold the values
            loss = float(torch.linalg.vector_norm(error)) / size if size else 0.0
        if twin is not None and loss <= self._max_loss:
            self._new = _attributes(twin)
        self.loss = LayerLoss(loss, live=self._new is None)

    def exchange(self, scratch: object = None) -> None:
        self._is_home = False
        if self._new is None:
            self._hook = self.layer.module.register_forward_hook(self._added)  # type: ignore[arg-type]
        else:
            _put(self.layer.module, self._new)

    def rewrite(self, update: Factors | DenseUpdate, scratch: object = None) -> None:
        self.restore()
        self.prepare(update)
        self.exchange()

    def changed(self) -> bool:
        """Return True if other code has replaced the weight object that this writer put into the layer.

        Its values are not compared, since bitsandbytes packs them when it first runs.
        """
        expected = self._own if self._new is None else self._new
        return not self.at_home and self.layer.module._parameters.get("weight") is not expected.get("weight")

    def restore(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if not self.at_home:
            _put(self.layer.module, self._own)
            self._is_home = True

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Use the layer's own quantised weight, with the update added to its output, inside the block."""
        new = self._new
        if self.at_home or new is None:
            yield
            return
        self.restore()
        self._new = None
        try:
            self.exchange()
            yield
        finally:
            self.restore()
            self._new = new
            self.exchange()


class _Added:
    """The hook that adds an update to a layer's output: y + x delta^T + gain (y - bias), in fp32 or better."""

    def __init__(self, update: Factors | DenseUpdate, device: torch.device) -> None:
        factors = (update.delta_OI,) if isinstance(update, DenseUpdate) else (update.a_RI, update.b_OR)
        self._factors = [factor.detach().to(device, torch.float32) for factor in factors]
        gain_O = None if isinstance(update, DenseUpdate) else update.gain_O
        self._gain_O = None if gain_O is None else gain_O.detach().to(device, torch.float32)

    def change(self, base_OI: Tensor) -> Tensor:
        """Return what the update adds to the weight, (O, I)."""
        delta_OI = self._factors[0] if len(self._factors) == 1 else self._factors[1] @ self._factors[0]
        return delta_OI if self._gain_O is None else delta_OI + self._gain_O[:, None] * base_OI

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
        dtype = torch.promote_types(y.dtype, torch.float32)
        added = given[0].to(dtype)
        for factor in self._factors:
            added = functional.linear(added, factor.to(dtype))
        if self._gain_O is not None:
            bias = _bias(module)
            y0 = y.to(dtype) if bias is None else y.to(dtype) - bias.to(dtype)
            added = added + self._gain_O.to(dtype) * y0
        return (y.to(dtype) + added).to(y.dtype)


def read_weight(layer: TargetLayer, module: Any, place: Place) -> Tensor:
    """Return the weight (O, I) in fp32 by which `module`, the layer's own or its requantised copy, computes."""
    weight = module._parameters.get("weight")
    if weight is not None and type(weight.data) is not Tensor:
        # torchao's, whose forward may round its inputs too
        return weight.data.dequantize().float()  # type: ignore[no-any-return]
    if getattr(weight, "quant_state", None) is not None and not _is_packed(weight):
        from bitsandbytes.functional import dequantize_4bit

        # the forward would pack the weight for good, and a packed weight gets no gradient
        return dequantize_4bit(weight.data, weight.quant_state).float()  # type: ignore[no-any-return]
    if getattr(weight, "dtype", None) == torch.int8 and hasattr(weight, "SCB"):
        scales_O = module.state.SCB if weight.SCB is None else weight.SCB
        # as its forward has it, which rounds its inputs too
        return weight.data.float() * (scales_O.float()[:, None] / 127)  # type: ignore[no-any-return]
    device, dtype = place
    bias, columns = _bias(module), []
    for start in range(0, layer.num_inputs, BLOCK):
        stop = min(start + BLOCK, layer.num_inputs)
        x = torch.zeros(stop - start, layer.num_inputs, device=device, dtype=dtype)
        x[torch.arange(stop - start), torch.arange(start, stop)] = 1
        y = module.forward(x).float()
        columns.append((y if bias is None else y - bias.float()).T)
    return torch.cat(columns, dim=1)


def quantised_again(module: Any, weight_OI: Tensor) -> Any:
    """Return a copy of a module with `weight_OI` quantised as its own weight is; None for an unsupported quantisation.

    Forms: bitsandbytes' 4-bit (nf4, fp4) and int8, torchao's Int8Tensor and IntxUnpackedToInt8Tensor.
    """
    weight = module._parameters.get("weight")
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    if (bitsandbytes := sys.modules.get("bitsandbytes")) is not None:
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            kept = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            settings = {name: getattr(weight, name) for name in kept}
            new = bitsandbytes.nn.Params4bit(weight_OI.contiguous(), requires_grad=False, **settings).to(weight.device)
            twin._parameters["weight"], twin.quant_state = new, new.quant_state
            if _is_packed(weight):
                twin.forward(torch.zeros(1, weight_OI.shape[1], device=weight.device))
            return twin
        if isinstance(weight, bitsandbytes.nn.Int8Params) and weight.dtype == torch.int8:
            # bitsandbytes takes values in fp16
            if float(weight_OI.abs().max()) > torch.finfo(torch.float16).max:
                return None
            new = bitsandbytes.nn.Int8Params(weight_OI.cpu(), requires_grad=False, has_fp16_weights=False)
            twin._parameters["weight"], twin.state = new.to(weight.device), copy.copy(module.state)
            twin.state.CB = twin.state.SCB = None
            return twin
    if weight is not None and (new := _torchao_again(weight.data, weight_OI)) is not None:
        twin._parameters["weight"] = nn.Parameter(new, requires_grad=False)
        return twin
    return None


def _is_packed(weight: Any) -> bool:
    """Return True if a 4-bit weight is packed for CPUs with AVX512, its scales rounded to bf16."""
    return bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def _torchao_again(weight: Any, weight_OI: Tensor) -> Any:
    values = weight_OI.to(weight.dtype)
    match type(weight).__name__:
        case "Int8Tensor" if weight.act_quant_scale is None and weight.act_pre_scale is None:
            from torchao.quantization import PerRow, PerTensor

            whole = tuple(weight.block_size) == tuple(weight.shape)
            settings = {"act_quant_kwargs": weight.act_quant_kwargs, "reduce_range": weight.reduce_range}
            return type(weight).from_hp(values, PerTensor() if whole else PerRow(), **settings)
        case "IntxUnpackedToInt8Tensor":
            from torchao.quantization.quant_primitives import MappingType

            symmetric = not bool(weight.zero_point.any())
            mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
            of = (values, tuple(weight.block_size), weight.target_dtype)
            settings = {"mapping_type": mapping, "activation_quantization": weight.activation_quantization}
            old_scales = {"custom_scale": weight.scale, "custom_zero_point": weight.zero_point}
            # new scales would round the untouched part again, and the old ones may cut what has grown: the nearer of both
            made = [
                type(weight).from_hp(*of, **settings),
                type(weight).from_hp(*of, **settings, **old_scales, intx_choose_qparams_algorithm=None),
            ]
            return min(made, key=lambda each: float((each.dequantize() - values).norm()))
    return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return {attribute: value} of all attributes from which a module's forward reads its weight."""
    beside = {name: vars(module)[name] for name in _BESIDE if name in vars(module)}
    return {"weight": module._parameters["weight"], **beside} if "weight" in module._parameters else beside


def _put(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if name == "weight":
            module._parameters[name] = value
        else:
            vars(module)[name] = value


def _bias(module: Any) -> Tensor | None:
    bias = getattr(module, "bias", None)
    # torch's quantised layers have a method of this name
    bias = bias() if callable(bias) and not isinstance(bias, Tensor) else bias
    return bias if isinstance(bias, Tensor) else None


def _place(model: nn.Module, layer: TargetLayer) -> Place:
    """Return (device of the layer's weight, dtype of the layer's inputs)."""
    if place := find_places(model, {layer.name: layer}).get(layer.name):
        return place
    tensors = [*layer.module.parameters(), *layer.module.buffers(), *model.parameters()]
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    dtype = next((parameter.dtype for parameter in model.parameters() if is_floating(parameter.dtype)), torch.float32)
    return device, dtype
