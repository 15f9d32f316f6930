"""Fusing: a task-scope mixture written into the base weights, and the kept originals copied back on leaving."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from loraweave.composer.merge.updates import DenseUpdate
from loraweave.composer.model.layers import TargetLayer, tied_parameters
from loraweave.composer.originals import Originals, Place
from loraweave.errors import CompositionError
from loraweave.types import Factors

Update = tuple[TargetLayer, Factors | DenseUpdate]

_FUSED: WeakSet[nn.Module] = WeakSet()


def is_fused(module: nn.Module) -> bool:
    """Whether the module's weights are those of a mixture just now."""
    return module in _FUSED


@contextmanager
def fused(model: nn.Module, updates: Iterable[Update], originals: Place = "memory") -> Iterator[Fusion]:
    """W' = W (1 + gain) + update and bias' = bias + bias of the update inside the block; bit for bit W and bias after it.

    Raises CompositionError on leaving, after restoring, when someone else changed a fused weight meanwhile; else what
    `Fusion.write` raises, with the model unchanged.
    """
    fusion = Fusion(model, originals)
    try:
        fusion.write(updates)
        yield fusion
    except BaseException as error:
        if changed := fusion.leave():
            error.add_note(_changed_message(changed))
        raise
    else:
        if changed := fusion.leave():
            raise CompositionError(_changed_message(changed))
    finally:
        # once more, for an interruption on the way to the lines above
        fusion.leave()


class Fusion:
    """A model, the mixture that is written into it, and the originals of all parameters that were ever written to.

    These take as many bytes as the parameters. While writing, there are also one parameter's own values and 4 MB.
    """

    def __init__(self, model: nn.Module, originals: Place = "memory") -> None:
        self.originals = Originals(originals)
        self._model = model
        self._kept: dict[tuple[TargetLayer, str], FusedParameter] = {}
        self._found_changed: list[str] = []
        self._tied: dict[str, str] | None = None
        self._left = False
        self._lock = threading.RLock()

    def write(self, updates: Iterable[Update]) -> None:
        """The weights of these updates, whatever was written before: W (1 + gain) + update, in fp32 or better, rounded once.

        One of `updates` is held at a time. What is not yet fused is calculated, and found finite, beside the model, and then
        changes places with the originals. What is fused already is written over, from its original, in one pass. Layers
        that are in no update get theirs back. The parameters stay the same objects in the same memory.

        Raises CompositionError for weights that are quantised, on the meta device or tied to another parameter, for values
        that are not finite, and for fused weights that someone else has changed (which then stay). Whatever fails, and
        interruptions, leave the base's own weights.
        """
        with self._lock:
            if self._left:
                raise CompositionError("the fused() block of this mixture has ended: open another one")
            if changed := [kept.name for kept in self._kept.values() if kept.changed()]:
                raise CompositionError(
                    f"{len(changed)} fused weights were changed by others while fused, the first {changed[0]!r}, and "
                    "another mixture would overwrite that: change weights only outside the block"
                )
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self._write(updates)
            except BaseException:
                self._restore()
                raise

    def leave(self) -> list[str]:
        """Puts every original back and lets go of them; the names of what others had changed. Twice is fine.

        An interruption, or an error about one parameter, is raised once all others are back.
        """
        with self._lock:
            self._left = True
            try:
                self._leave()
            except BaseException:
                # from where it was interrupted
                self._leave()
                raise
            found, self._found_changed = self._found_changed, []
            return found

    def _write(self, updates: Iterable[Update]) -> None:
        scratch = Scratch()
        new: list[FusedParameter] = []
        left_out = dict(self._kept)
        for layer, update in updates:
            for part in self._parts(layer, update):
                left_out.pop((layer, part), None)
                kept = self._parameter(layer, part)
                if kept.at_home:
                    kept.prepare(update, scratch)
                    new.append(kept)
                else:
                    kept.rewrite(update, scratch)
                self.originals.rest(kept.slot)
        for kept in left_out.values():
            kept.restore()
            self.originals.rest(kept.slot)
        for kept in new:
            _FUSED.add(kept.layer.module)
            kept.exchange(scratch)
            self.originals.rest(kept.slot)

    def _parameter(self, layer: TargetLayer, part: str) -> FusedParameter:
        if (layer, part) not in self._kept:
            parameter = layer.module._parameters[part]
            assert parameter is not None
            self._kept[layer, part] = FusedParameter(layer, part, parameter, self.originals.slot(parameter))
        return self._kept[layer, part]

    def _parts(self, layer: TargetLayer, update: Factors | DenseUpdate) -> list[str]:
        """Which parameters the update changes. Raises CompositionError for those that cannot be written to."""
        parts = []
        if not isinstance(update, Factors) or update.rank or update.gain_O is not None:
            layer.dense_weight_OI()
            weight = layer.module._parameters.get("weight")
            if weight is None or type(weight.data) is not Tensor:
                found = "computed on the way" if weight is None else f"a {type(weight.data).__name__}"
                raise CompositionError(
                    f"cannot fuse into layer {layer.name!r}: its weight is {found}, not a plain parameter; activate() "
                    "instead"
                )
            parts.append("weight")
        bias = layer.module._parameters.get("bias")
        if update.bias_O is not None and bool(update.bias_O.any()):
            if bias is None:
                raise CompositionError(
                    f"cannot fuse a bias into layer {layer.name!r}, which has none; activate() the mixture instead"
                )
            parts.append("bias")
        if self._tied is None:
            self._tied = tied_parameters(self._model)
        for part in parts:
            name = f"{layer.name}.{part}"
            if name in self._tied:
                raise CompositionError(
                    f"cannot fuse into {name!r}: its memory is also {self._tied[name]!r} (tied weights), which would change "
                    "too; activate() the mixture instead"
                )
        return parts

    def _restore(self) -> None:
        for kept in self._kept.values():
            kept.restore()
            self.originals.rest(kept.slot)

    def _leave(self) -> None:
        interruption: BaseException | None = None
        for kept in reversed(self._kept.values()):
            for _ in range(2):
                try:
                    if kept.leave():
                        self._found_changed.append(kept.name)
                    self.originals.rest(kept.slot)
                    break
                except BaseException as error:
                    interruption = interruption or error
        if interruption is not None:
            raise interruption
        for kept in self._kept.values():
            _FUSED.discard(kept.layer.module)
        self._kept.clear()
        self.originals.close()


def _changed_message(changed: list[str]) -> str:
    return (
        f"{len(changed)} fused weights were changed by others while fused, the first {changed[0]!r}; the originals from "
        "before fusing are back, and that change is lost: change weights only outside the block"
    )


# values that are summed at once: 4 MB of fp32, which stay in the cache between the product and the rounding
BLOCK = 2**20


class Scratch:
    """Memory that is used again and again while writing: one tensor for each device and dtype, as large as was needed."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        found = self._tensors.get((device, dtype))
        if found is None or found.numel() < size:
            found = self._tensors[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return found[:size].view(shape)


class FusedParameter:
    """The weight or bias of a layer. `slot` takes what is to be written, and has the original once that is written."""

    def __init__(self, layer: TargetLayer, part: str, parameter: Tensor, slot: Tensor) -> None:
        self.layer = layer
        self.part = part
        self.slot = slot
        self._parameter = parameter
        # always a tensor that has the original values, whenever an interruption comes
        self._original = parameter
        self._written: tuple[torch.dtype, Tensor] | None = None

    @property
    def name(self) -> str:
        return f"{self.layer.name}.{self.part}"

    @property
    def at_home(self) -> bool:
        """Whether the parameter has its original values, as far as this object has written to it."""
        return self._original is self._parameter

    def prepare(self, update: Factors | DenseUpdate, scratch: Scratch) -> None:
        """The new values into the slot, for `exchange`. Raises CompositionError for values that are not finite."""
        self._sum(update, self._parameter, self.slot, scratch)

    def exchange(self, scratch: Scratch) -> None:
        """The slot's values into the parameter, and the original ones into the slot."""
        spare = scratch.like(self.slot.shape, self.slot.dtype, self._parameter.device)
        spare.copy_(self._parameter)
        self._original = spare
        self._assign(self.slot)
        self._seal()
        self.slot.copy_(spare)
        self._original = self.slot

    def rewrite(self, update: Factors | DenseUpdate, scratch: Scratch) -> None:
        """The original values and this update into the parameter, whatever is in it. Raises as prepare."""
        self._written = None
        self._sum(update, self.slot, self._parameter, scratch)
        self._seal()

    def changed(self) -> bool:
        """Whether someone else has written to the parameter, or replaced it, since.

        Compared are the sums of each row's bits as whole numbers of up to eight bytes, which reads the weights once and sees
        writes of every kind (through .data or numpy too), but not such words changing places within a row. A move to
        another dtype is no change.
        """
        if self.at_home:
            return False
        if self.layer.module._parameters.get(self.part) is not self._parameter:
            return True
        if self._written is None or self._parameter.dtype != self._written[0]:
            return False
        now = row_sums(self._parameter)
        return not torch.equal(now, self._written[1].to(now.device))

    def restore(self) -> None:
        if not self.at_home:
            self._assign(self._original)
            self.layer.module._parameters[self.part] = self._parameter  # type: ignore[assignment]
            self._written = None
            self._original = self._parameter

    def leave(self) -> bool:
        """Restores, and says whether someone else had changed the parameter."""
        try:
            # just before the copy, which then finds the parameter in the cache
            return self.changed()
        finally:
            self.restore()

    def _assign(self, values: Tensor) -> None:
        with torch.inference_mode(self._parameter.is_inference()), torch.no_grad():
            self._parameter.copy_(values)

    def _seal(self) -> None:
        self._written = self._parameter.dtype, row_sums(self._parameter)

    def _sum(self, update: Factors | DenseUpdate, base: Tensor, target: Tensor, scratch: Scratch) -> None:
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            if self.part == "weight":
                self._sum_weight(update, base, target, scratch)
            else:
                assert update.bias_O is not None
                exact = base.to(self._parameter.device, torch.promote_types(base.dtype, torch.float32), copy=True)
                self._put(exact.add_(update.bias_O.to(exact)), target)

    def _sum_weight(self, update: Factors | DenseUpdate, base: Tensor, target: Tensor, scratch: Scratch) -> None:
        """Block by block of rows as they are stored (of the matrix (I, O) where it is stored so; of a kernel all axes)."""
        device, dtype = self._parameter.device, torch.promote_types(base.dtype, torch.float32)
        num_rows, num_columns = base.shape[0], base.shape[1:].numel()
        step = max(1, BLOCK // num_columns)
        gain_O = delta = left = right = None
        if isinstance(update, DenseUpdate):
            delta = update.delta_OI.T if self.layer.transposed else update.delta_OI
        else:
            left, right = (update.a_RI.T, update.b_OR.T) if self.layer.transposed else (update.b_OR, update.a_RI)
            left, right = left.to(device, dtype), right.to(device, dtype)
            gain_O = None if update.gain_O is None else 1 + update.gain_O.to(device, dtype)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            exact = scratch.like((rows.stop - rows.start, num_columns), dtype, device).copy_(base[rows].flatten(1))
            if gain_O is not None:
                exact.mul_(gain_O if self.layer.transposed else gain_O[rows, None])
            if delta is not None:
                exact.add_(delta[rows].to(device, dtype))
            elif left is not None and right is not None:
                added_product(exact, left[rows], right)
            self._put(exact, target[rows])

    def _put(self, exact: Tensor, target: Tensor) -> None:
        limit = torch.finfo(target.dtype).max
        # no value is above the root of the sum of squares, which is read at twice the speed of the extremes; both are NaN
        # where one value is, so that the comparison must be this way round
        if not float(torch.linalg.vector_norm(exact)) <= limit:
            lowest, highest = (float(value) for value in exact.aminmax())
            if not (-limit <= lowest and highest <= limit):
                raise CompositionError(
                    f"cannot fuse into {self.name!r}: its new values would be from {lowest:g} to {highest:g}, and "
                    f"{target.dtype} holds {limit:g} at most; use smaller weights, or leave out what is not sound"
                )
        target.copy_(exact.view(target.shape))


def row_sums(tensor: Tensor) -> Tensor:
    """The sum of each row's bits, as whole numbers of eight bytes where rows divide into such."""
    whole = tensor.detach().contiguous()
    whole = whole.flatten(1) if whole.ndim > 2 else whole
    offset, row = (count * whole.element_size() for count in (whole.storage_offset(), whole.shape[-1]))
    word = next(word for word in _WORDS if offset % word.itemsize == 0 and row % word.itemsize == 0)
    return whole.view(word).sum(dim=-1, dtype=torch.int64)


_WORDS = (torch.int64, torch.int32, torch.int16)


def added_product(into_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """`into` itself, with left @ right added to it; the same as `into.addmm_(left, right)` up to the order of summation.

    torch multiplies fp32 by MKL, which runs at half the speed of oneDNN on processors of AMD with AVX-512 (110 against 240
    GFLOP/s for K = 64). oneDNN is reached by the operation that torch.compile uses for linear layers; where that is
    missing, as on a GPU or in another dtype, `addmm_` it is.
    """
    linear = _onednn_linear()
    if linear is None or into_MN.dtype != torch.float32 or into_MN.device.type != "cpu" or left_MK.shape[1] == 0:
        return into_MN.addmm_(left_MK, right_KN)
    return into_MN.add_(linear(left_MK.contiguous(), right_KN.T, None, "none", [], ""))


@cache
def _onednn_linear() -> Any:
    """The operation x, w, bias, ... -> x w^T + bias; None where this torch has it not, or with another meaning."""
    try:
        operation = torch.ops.mkldnn._linear_pointwise
        x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
        found = operation(x, w, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operation if found.tolist() == [[11.0, 17.0]] else None
