"""Fusing: a task-scope mixture written into the base weights, and the kept originals copied back on leaving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn

from loraweave.composer.layers import TargetLayer
from loraweave.errors import CompositionError
from loraweave.types import Factors

_FUSED: WeakSet[nn.Module] = WeakSet()


def is_fused(module: nn.Module) -> bool:
    """Whether the module's weights are those of a mixture just now."""
    return module in _FUSED


@dataclass(eq=False)
class _Kept:
    """One parameter that is written to: its original values, and what identifies the values that were written."""

    layer: TargetLayer
    part: str
    parameter: Tensor
    original: Tensor
    written: tuple[torch.dtype, int] | None = None

    def changed(self) -> bool:
        """Whether someone else has written to the parameter or replaced it since. A move to another dtype is no change."""
        if self.layer.module._parameters.get(self.part) is not self.parameter:
            return True
        if self.written is None or self.parameter.dtype != self.written[0]:
            return False
        return _checksum(self.parameter) != self.written[1]

    def restore(self) -> None:
        with torch.no_grad():
            self.parameter.copy_(self.original)
        self.layer.module._parameters[self.part] = self.parameter  # type: ignore[assignment]


@contextmanager
def fused(model: nn.Module, updates: Mapping[TargetLayer, Factors]) -> Iterator[None]:
    """W' = W (1 + gain) + b a and bias' = bias + bias of the update inside the block; bit for bit W and bias after it.

    Calculated in fp32 or better, one layer at a time, and rounded once. The parameters stay the same objects in the same
    memory. Raises CompositionError before anything has changed for weights that are quantised, on the meta device or tied
    to another parameter; and on leaving, after restoring, when someone else changed a fused weight meanwhile.
    """
    _check(model, updates)
    kept: list[_Kept] = []
    try:
        for layer, update in updates.items():
            _FUSED.add(layer.module)
            _write(layer, update, kept)
        yield
    except BaseException as error:
        if changed := _restore(kept):
            error.add_note(_changed_message(changed))
        raise
    else:
        if changed := _restore(kept):
            raise CompositionError(_changed_message(changed))
    finally:
        for layer in updates:
            _FUSED.discard(layer.module)


def _check(model: nn.Module, updates: Mapping[TargetLayer, Factors]) -> None:
    touched: dict[str, TargetLayer] = {}
    for layer, update in updates.items():
        layer.dense_weight_OI()
        weight, bias = layer.module._parameters.get("weight"), layer.module._parameters.get("bias")
        if weight is None or type(weight.data) is not Tensor:
            found = "computed on the way" if weight is None else f"a {type(weight.data).__name__}"
            raise CompositionError(
                f"cannot fuse into layer {layer.name!r}: its weight is {found}, not a plain parameter; activate() instead"
            )
        touched[f"{layer.name}.weight"] = layer
        if update.bias_O is not None and bool(update.bias_O.any()):
            if bias is None:
                raise CompositionError(
                    f"cannot fuse a bias into layer {layer.name!r}, which has none; activate() the mixture instead"
                )
            touched[f"{layer.name}.bias"] = layer
    _check_untied(model, touched)


def _check_untied(model: nn.Module, touched: Mapping[str, TargetLayer]) -> None:
    """Raises CompositionError when a touched parameter shares memory with another one."""
    spans = []
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
            continue
        extent = sum((size - 1) * abs(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size(), name))
    spans.sort()
    widest: tuple[str, int, int, str] | None = None
    for span in spans:
        if widest is not None and span[0] == widest[0] and span[1] < widest[2]:
            pair = [name for name in (widest[3], span[3]) if name in touched]
            if pair:
                other = span[3] if pair[0] == widest[3] else widest[3]
                raise CompositionError(
                    f"cannot fuse into {pair[0]!r}: its memory is also {other!r} (tied weights), which would change too; "
                    "activate() the mixture instead"
                )
        if widest is None or span[0] != widest[0] or span[2] > widest[2]:
            widest = span


def _write(layer: TargetLayer, update: Factors, kept: list[_Kept]) -> None:
    weight = layer.module._parameters["weight"]
    assert weight is not None
    with torch.no_grad():
        exact = torch.promote_types(weight.dtype, torch.float32)
        weight_OI = layer.dense_weight_OI().to(exact)
        if update.gain_O is not None:
            weight_OI = weight_OI * (1 + update.gain_O.to(weight_OI))[:, None]
        weight_OI = weight_OI + update.b_OR.to(weight_OI) @ update.a_RI.to(weight_OI)
        _put(layer, "weight", weight_OI.T if layer.transposed else weight_OI, kept)
        bias = layer.module._parameters.get("bias")
        if update.bias_O is not None and bias is not None:
            _put(layer, "bias", bias.to(exact) + update.bias_O.to(bias.device, exact), kept)


def _put(layer: TargetLayer, part: str, values: Tensor, kept: list[_Kept]) -> None:
    parameter = layer.module._parameters[part]
    assert parameter is not None
    # kept before it is written to: an interruption in between restores what is already there
    keeping = _Kept(layer, part, parameter, parameter.detach().clone())
    kept.append(keeping)
    parameter.copy_(values)
    keeping.written = (parameter.dtype, _checksum(parameter))


def _restore(kept: Sequence[_Kept]) -> list[str]:
    """Puts every original back, also through interruptions, which are raised at the end; names what others had changed."""
    changed: list[_Kept] = []
    try:
        changed = _safely(kept, _Kept.changed)
    finally:
        _safely(kept, _Kept.restore)
    return [f"{each.layer.name}.{each.part}" for each in changed]


def _safely(kept: Sequence[_Kept], action: Callable[[_Kept], bool | None]) -> list[_Kept]:
    """Those for which `action` is true; an interruption is raised once all are done, after a second try of its own one."""
    found: list[_Kept] = []
    interruption: BaseException | None = None
    for each in reversed(kept):
        for _ in range(2):
            try:
                if action(each):
                    found.append(each)
                break
            except BaseException as error:
                interruption = interruption or error
    if interruption is not None:
        raise interruption
    return found


def _checksum(tensor: Tensor) -> int:
    bits = tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _changed_message(changed: Sequence[str]) -> str:
    return (
        f"{len(changed)} fused weights were changed by others while fused, the first {changed[0]!r}; the originals from "
        "before fusing are back, and that change is lost: change weights only outside the block"
    )
