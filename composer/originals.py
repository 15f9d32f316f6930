"""Where the original values of fused weights are kept: in memory, or in files that have no name."""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraweave.errors import CompositionError

Place = Literal["memory", "disk"]

# one mapping holds the slots of many parameters: pages of 2 MB, which the kernel fills four times faster, need large ones
CHUNK_BYTES = 2**25


class Originals:
    """Slots for the values of parameters: as many bytes as the parameters have, each slot rounded up to whole pages.

    "memory" has them beside the parameter, on its device. "disk" has them in the folder for temporary files (TMPDIR): in
    files that only this process can open, since they have no name, and that are gone with it, however it ends. They are
    mapped, and pages that are not just being read or written do not count as this process's memory. Their space is
    reserved before a slot is given. Raises CompositionError where there is no space, or for another word.
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
        """A contiguous tensor of the shape and dtype of `like`, its values undefined."""
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
        """Says that `slot` is not needed just now, so that its pages on disk need not stay in memory."""
        if hasattr(mmap, "MADV_DONTNEED") and (found := self._on_disk.get(slot.data_ptr())):
            mapping, start, size = found
            # of a shared mapping this drops no value, only this process's hold on the file's pages
            mapping.madvise(mmap.MADV_DONTNEED, start, size)

    def close(self) -> None:
        """Lets go of everything; slots that someone still holds stay as they are. Twice is fine."""
        self._chunks.clear()
        self._on_disk.clear()

    def _chunk(self, num_bytes: int, device: torch.device) -> _Chunk:
        num_bytes = -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self.place == "disk":
            mapping = _mapped_file(num_bytes)
        elif device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
            mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # a kernel without such pages says no
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
    """New bytes of a file that is open nowhere else and has no name; it lives as long as the mapping."""
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
