"""One parameter that is written over: where its original values are kept, how new ones replace them, and the restoring.

    at home                        prepared                       written
    parameter: W     prepare       parameter: W     exchange      parameter: W'    <-+  rewrite: another mixture's W',
    slot: anything  --------->     slot: W'        ---------->    slot: W          --+  calculated from the slot
       ^                                                              |
       +--------------------------- restore: copied, not subtracted --+

W' = W (1 + gain) + update and bias' = bias + the update's bias, in fp32 or better, rounded once. The naive twin is that line
as it stands, in float64 (`tests/composer/fused/test_fused.py`). The fast way goes block by block through a cache, with the
product of `added_product`, which is `addmm_` or equals it. The parameter stays the same object in the same memory, and
`_original` is at every moment a tensor with the values of W, so that an interruption at any line can be undone.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import loraweave.registry as registry
from loraweave.composer.live.kernels._parts import kernels_with
from loraweave.composer.merge.method_call import DenseUpdate
from loraweave.composer.model.layers import TargetLayer, row_sums
from loraweave.errors import CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

# values that are summed at once: 4 MB of fp32, which stay in the cache between the product and the rounding
BLOCK = 2**20


@dataclass(frozen=True)
class LayerLoss:
    """The loss of a layer whose weight cannot hold an update exactly.

    `loss` is the norm of the writing's error over that of the update, infinite where nothing can be written; `live` is True
    if the layer's weight therefore stays unchanged and the layer adds the update to its output.
    """

    loss: float
    live: bool


class WeightWriter(ABC):
    """A writer of mixtures into one parameter of a layer, which can restore the original values; `slot` is its memory.

    A subclass in the registry `writers` writes into weights that are not plain floats, if a loss is allowed: it is
    constructed from the model, a layer that it `takes`, and the largest loss.
    """

    layer: TargetLayer
    slot: Tensor
    # the loss of the latest update; None if the weight holds it exactly
    loss: LayerLoss | None = None

    @classmethod
    def takes(cls, layer: TargetLayer) -> bool:
        """Return True if this writer can write into the layer's weight."""
        return False

    @classmethod
    def warnings(cls, adapters: Mapping[str, Adapter], layers: Mapping[str, TargetLayer]) -> list[str]:
        """Return a sentence for each adapter that becomes less exact when it is written into the model's own weights."""
        return []

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the parameter."""

    @property
    @abstractmethod
    def at_home(self) -> bool:
        """True if the parameter has its original values, unless someone else has written to it."""

    @abstractmethod
    def prepare(self, update: Factors | DenseUpdate, scratch: Scratch) -> None:
        """Calculate new values for `exchange`. Raises CompositionError for values that are not finite."""

    @abstractmethod
    def exchange(self, scratch: Scratch) -> None:
        """Put the new values in place of the original ones."""

    @abstractmethod
    def rewrite(self, update: Factors | DenseUpdate, scratch: Scratch) -> None:
        """Put another update in, calculated from the original values. Raises what `prepare` raises."""

    @abstractmethod
    def changed(self) -> bool:
        """Return True if someone else has written to the parameter, or replaced it, since."""

    @abstractmethod
    def restore(self) -> None:
        """Put the original values back."""

    def leave(self) -> bool:
        """Restore, and return whether someone else had changed the parameter."""
        try:
            # just before the copy, which then finds the parameter in the cache
            return self.changed()
        finally:
            self.restore()

    def exact(self) -> AbstractContextManager[None]:
        """Return a context in which the layer computes as if its weight held the update exactly."""
        return nullcontext()


def lossy_writers() -> tuple[type[Any], ...]:
    """Return the writers of the registry, subclasses of WeightWriter."""
    return tuple(registry.get("writers", name) for name in registry.names("writers"))


class Overwritten(WeightWriter):
    """The weight or bias of a layer. `slot` holds the values to write, and once they are written the original ones."""

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
    def _values(self) -> Tensor:
        """The layer's part of the parameter: all of it, or one expert's matrix."""
        return self._parameter if self.layer.number is None else self._parameter.detach()[self.layer.number]

    @property
    def at_home(self) -> bool:
        return self._original is self._parameter

    def prepare(self, update: Factors | DenseUpdate, scratch: Scratch) -> None:
        self._sum(update, self._values, self.slot, scratch)

    def exchange(self, scratch: Scratch) -> None:
        spare = scratch.like(self.slot.shape, self.slot.dtype, self._parameter.device)
        spare.copy_(self._values)
        self._original = spare
        self._assign(self.slot)
        self._seal()
        self.slot.copy_(spare)
        self._original = self.slot

    def rewrite(self, update: Factors | DenseUpdate, scratch: Scratch) -> None:
        self._written = None
        self._sum(update, self.slot, self._values, scratch)
        self._seal()

    def changed(self) -> bool:
        """Return True if someone else has written to the parameter, or replaced it, since.

        The sums of each row's bits are compared, as whole numbers of up to eight bytes. This reads the weights once and sees
        writes of every kind (through .data or numpy too), but not two that swap places in a row. A move to another dtype
        does not count.
        """
        if self.at_home:
            return False
        if self.layer.module._parameters.get(self.layer.key(self.part)) is not self._parameter:
            return True
        if self._written is None or self._parameter.dtype != self._written[0]:
            return False
        now = row_sums(self._values)
        return not torch.equal(now, self._written[1].to(now.device))

    def restore(self) -> None:
        if not self.at_home:
            self._assign(self._original)
            self.layer.module._parameters[self.layer.key(self.part)] = self._parameter  # type: ignore[assignment]
            self._written = None
            self._original = self._parameter

    def _assign(self, values: Tensor) -> None:
        with torch.inference_mode(self._parameter.is_inference()), torch.no_grad():
            self._values.copy_(values)

    def _seal(self) -> None:
        self._written = self._parameter.dtype, row_sums(self._values)

    def _sum(self, update: Factors | DenseUpdate, base: Tensor, target: Tensor, scratch: Scratch) -> None:
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            if self.part == "weight":
                self._sum_weight(update, base, target, scratch)
            else:
                assert update.bias_O is not None
                exact = base.to(self._parameter.device, torch.promote_types(base.dtype, torch.float32), copy=True)
                self._put(exact.add_(update.bias_O.to(exact)), target)

    def _sum_weight(self, update: Factors | DenseUpdate, base: Tensor, target: Tensor, scratch: Scratch) -> None:
        """Write base (1 + gain) + update into `target`, a block of stored rows at a time.

        Rows are those of the matrix (I, O) where the layer stores its weight so; a convolution's kernel is flattened by row.
        """
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
                    f"{target.dtype} holds {limit:g} at most; use smaller weights, or leave out adapters with such values"
                )
        target.copy_(exact.view(target.shape))


class Scratch:
    """Memory that is reused while writing: one tensor for each device and dtype, of the largest size asked for."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        memory = self._tensors.get((device, dtype))
        if memory is None or memory.numel() < size:
            memory = self._tensors[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(shape)


Place = Literal["memory", "disk"]

# one mapping holds the slots of many parameters: pages of 2 MB, which the kernel fills four times faster, need large ones
CHUNK_BYTES = 2**25


class Originals:
    """Slots for the values of parameters: as many bytes as the parameters have, each slot rounded up to whole pages.

    "memory" has them beside the parameter, on its device. "disk" has them in the folder for temporary files (TMPDIR): in
    files that only this process can open, since they have no name, and that are gone with it, however it ends. They are
    mapped, and pages that are not just being read or written do not count as this process's memory. Their space is reserved
    before a slot is given. Raises CompositionError without enough space, or for another word.
    """

    def __init__(self, place: Place) -> None:
        if place not in ("memory", "disk"):
            raise CompositionError(f"originals={place!r} is neither 'memory' nor 'disk'")
        self.place = place
        self.num_bytes = 0
        # the newest chunk of each device and how much of it is used
        self._chunks: dict[torch.device, tuple[_Chunk, int]] = {}
        self._on_disk: dict[int, tuple[mmap.mmap, int, int]] = {}

    def slot(self, like: Tensor) -> Tensor:
        """Return a contiguous tensor of the shape and dtype of `like`, its values undefined."""
        device = like.device if self.place == "memory" else torch.device("cpu")
        num_bytes = like.numel() * like.element_size()
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        chunk, used = self._chunks.get(device, (None, 0))
        if chunk is None or used + size > chunk.bytes.numel():
            # larger ones as there are more, so that a large model does not need a thousand open files
            chunk, used = self._chunk(max(size, CHUNK_BYTES, self.num_bytes // 8), device), 0
        self._chunks[device] = (chunk, used + size)
        self.num_bytes += size
        slot = chunk.bytes[used : used + num_bytes].view(like.dtype).view(like.shape)
        if self.place == "disk" and chunk.mapping is not None:
            self._on_disk[slot.data_ptr()] = (chunk.mapping, used, size)
        return slot

    def rest(self, slot: Tensor) -> None:
        """Let the pages of a slot that is not needed just now leave memory, if they are on disk."""
        if hasattr(mmap, "MADV_DONTNEED") and (place := self._on_disk.get(slot.data_ptr())):
            mapping, start, size = place
            # of a shared mapping this drops no value, only this process's hold on the file's pages
            mapping.madvise(mmap.MADV_DONTNEED, start, size)

    def close(self) -> None:
        """Release all slots; those still in use elsewhere stay valid. A second call does nothing."""
        self._chunks.clear()
        self._on_disk.clear()

    def _chunk(self, num_bytes: int, device: torch.device) -> _Chunk:
        num_bytes = -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self.place == "disk":
            mapping = _mapped_file(num_bytes)
        elif device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
            mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # a kernel without such pages refuses
            with suppress(OSError):
                mapping.madvise(mmap.MADV_HUGEPAGE)
        else:
            return _Chunk(torch.empty(num_bytes, dtype=torch.uint8, device=device), None)
        return _Chunk(torch.frombuffer(mapping, dtype=torch.uint8), mapping)


@dataclass(frozen=True, eq=False)
class _Chunk:
    bytes: Tensor
    mapping: mmap.mmap | None


def _mapped_file(num_bytes: int) -> mmap.mmap:
    """Return a new mapping of `num_bytes` of a nameless temporary file, which exists as long as the mapping."""
    try:
        with tempfile.TemporaryFile(prefix="loraweave-") as file:
            # writing to a mapped hole of a full disk would end the process without an exception
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.write(bytes(num_bytes))
                file.flush()
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise CompositionError(
            f"cannot keep {num_bytes:,} more bytes of original weights in {tempfile.gettempdir()!r} ({error}): set the "
            "environment variable TMPDIR to a folder with space, or use originals='memory'"
        ) from error


def added_product(into_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """Return `into` itself with left @ right added, by a kernel of the registry that has `add_product`, or by `addmm_`."""
    for kernel in kernels_with("add_product").values():
        if kernel.add_product(into_MN, left_MK, right_KN):
            return into_MN
    return into_MN.addmm_(left_MK, right_KN)
