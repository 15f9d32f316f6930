"""One parameter that a mixture is written into: the sum, its way into the model, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.composer.added_product import added_product
from loraweave.composer.dense_update import DenseUpdate
from loraweave.composer.layers import TargetLayer
from loraweave.errors import CompositionError
from loraweave.types import Factors

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
