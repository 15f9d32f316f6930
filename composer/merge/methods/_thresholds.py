"""Which entries of a tensor are the largest in magnitude: exactly, without sorting, equal magnitudes included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraweave.composer.merge.methods._entries import Entries, Keep, Prune

# how many of an fp32 number's 32 bits the second look at a histogram resolves
LOW_BITS = 16

Blocks = Callable[[], Iterator[tuple[slice, Tensor]]]


@dataclass(frozen=True)
class Cut:
    """Keeps magnitudes above `value`, and those equal to it up to the flat index `last` (row by row)."""

    value: float
    last: float = -1

    def apply(self, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        """Writes the entries of a block that are kept, and zeros elsewhere."""
        width = block_BI.shape[1]
        # hardshrink keeps what is above its bound: one step below `value` keeps the equal ones too
        below = float(np.nextafter(np.float32(self.value), np.float32(0)))
        if self.last >= rows.stop * width - 1:
            _shrink(block_BI, below, out_BI)
        elif self.last < rows.start * width:
            _shrink(block_BI, self.value, out_BI)
        else:
            split = int(self.last) + 1 - rows.start * width
            block_N, out_N = block_BI.reshape(-1), out_BI.view(-1)
            _shrink(block_N[:split], below, out_N[:split])
            _shrink(block_N[split:], self.value, out_N[split:])


NOTHING = Cut(math.inf)
EVERYTHING = Cut(0.0)


def count_of(density: float, size: int) -> int:
    """How many of `size` entries a density keeps: rounded down, as PEFT and mergekit do."""
    return int(density * size)


def largest(blocks: Blocks, count: int, scratch_OI: Tensor) -> Cut:
    """The cut that keeps exactly the `count` largest magnitudes (zeros aside), of equal ones those with the lower index.

    `blocks()` gives (rows, magnitudes) in order, the same bits each time. `scratch_OI` is overwritten.
    """
    if count <= 0:
        return NOTHING
    size = scratch_OI.numel()
    if count >= size:
        return EVERYTHING
    for rows, magnitudes_BI in blocks():
        scratch_OI[rows] = magnitudes_BI
    ordered = scratch_OI.view(-1).numpy()
    ordered.partition(size - count)
    value = float(ordered[size - count])
    if value == 0.0:
        return EVERYTHING
    if float(ordered[: size - count].max()) < value:
        return Cut(value, size)
    return Cut(value, _place(blocks, value, int(np.count_nonzero(ordered[size - count :] == value))))


def keep_largest(entries: Entries, count: int, scratch_OI: Tensor) -> Keep:
    """Keeps the `count` largest entries of each expert."""
    return keep_above([largest(_magnitudes(entries, expert), count, scratch_OI) for expert in range(len(entries))])


def prune_smallest(density: float) -> Prune:
    """Keeps the int(density * entries) largest magnitudes of each expert's tensor, of equal ones the earlier."""
    return lambda entries, scratch_OI: keep_largest(entries, count_of(density, entries.size), scratch_OI)


def keep_above(cuts: Sequence[Cut]) -> Keep:
    """Keeps what each expert's cut keeps."""

    def keep(expert: int, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        cuts[expert].apply(rows, block_BI, out_BI)

    return keep


class Histogram:
    """The k-th largest of magnitudes that come tensor by tensor, from counts over their fp32 bit patterns.

    For numbers that are not negative the order of the bit patterns is the order of the values. First `add` everything,
    then `narrow`, then `refine` everything once more; `value` is then exact.
    """

    def __init__(self) -> None:
        self._high = torch.zeros(2 ** (31 - LOW_BITS), dtype=torch.int64)
        self._low = np.zeros(2**LOW_BITS, dtype=np.int64)
        self._waiting: list[NDArray[np.uint32]] = []
        self._bin = 0
        self._rest = 0

    def add(self, scratch_OI: Tensor) -> None:
        """Counts a tensor of magnitudes, which is overwritten."""
        bits = scratch_OI.view(torch.int32).bitwise_right_shift_(LOW_BITS).view(-1)
        self._high += torch.bincount(bits, minlength=len(self._high))

    def narrow(self, count: int) -> None:
        """Settles for which k `value` is asked: the `count`-th largest, 1 or more."""
        above = self._high.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, count))
        # where there are fewer magnitudes than asked for, the others are zeros that nobody added
        self._bin = max(0, len(above) - 1 - place)
        self._rest = count - int(above[place - 1]) if 0 < place < len(above) else count

    def refine(self, magnitudes_BI: Tensor) -> None:
        """Looks at a block again."""
        magnitudes = magnitudes_BI.numpy()
        low, high = (np.uint32(edge << LOW_BITS).view(np.float32) for edge in (self._bin, self._bin + 1))
        inside = magnitudes >= low
        inside &= magnitudes < high
        self._waiting.append(magnitudes[inside].view(np.uint32))
        if sum(map(len, self._waiting)) > len(self._low):
            self._settle()

    @property
    def value(self) -> float:
        self._settle()
        above = self._low[::-1].cumsum()
        place = int(np.searchsorted(above, self._rest))
        low = max(0, len(above) - 1 - place)
        return float(np.uint32((self._bin << LOW_BITS) | low).view(np.float32))

    def _settle(self) -> None:
        if self._waiting:
            lows = np.concatenate(self._waiting) & np.uint32(2**LOW_BITS - 1)
            self._low += np.bincount(lows, minlength=len(self._low))
            self._waiting = []


def _magnitudes(entries: Entries, expert: int) -> Blocks:
    return lambda: entries.magnitudes(expert)


def _place(blocks: Blocks, value: float, number: int) -> int:
    """The flat index of the `number`-th entry (1 or more) equal to `value`."""
    start = 0
    for _, magnitudes_BI in blocks():
        equal = np.flatnonzero(magnitudes_BI.reshape(-1).numpy() == np.float32(value))
        if number <= len(equal):
            return start + int(equal[number - 1])
        number -= len(equal)
        start += magnitudes_BI.numel()
    raise AssertionError("the second pass saw other numbers than the first")


def _shrink(block: Tensor, bound: float, out: Tensor) -> None:
    torch.ops.aten.hardshrink.out(block, bound, out=out)
