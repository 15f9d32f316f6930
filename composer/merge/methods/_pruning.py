"""The pruning of an update's entries: keep the largest in magnitude, or keep entries by a random mask.

The largest are found exactly, without sorting, equal magnitudes included. A mask depends on a seed and an entry's place
alone, not on blocks, threads, device or order of experts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraweave.composer.merge.methods._entries import Entries, Numbers, Prune, Rule

# up to this many magnitudes are read without a sample first
SAMPLED = 2**14
# the least number of magnitudes near the cut to reserve memory for
ROOM = 2**10
# blocks in each part of a layer that is searched for an entry
BLOCKS_OF_PART = 16

Blocks = Callable[[], Iterator[tuple[slice, Tensor]]]


@dataclass(frozen=True)
class Cut:
    """A rule that keeps magnitudes above `value`, and those equal to it up to the flat index `last` (row by row)."""

    value: float
    last: float = -1

    @property
    def numbers(self) -> Numbers:
        return Numbers(self.value, int(min(self.last, 2**62)))

    def apply(self, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        """Write the kept entries of a block of `rows` to out_BI, and zeros elsewhere."""
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


def largest(blocks: Blocks, count: int, scratch_OI: Tensor) -> Cut:
    """Return the cut that keeps exactly the `count` largest magnitudes (zeros aside), of equal ones those of lower index.

    `blocks()` yields (rows, magnitudes) in order, the same bits each time. `scratch_OI` is overwritten.
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


def keep_largest(entries: Entries, count: int) -> Sequence[Cut]:
    """Return cuts that keep exactly each expert's `count` largest magnitudes (zeros aside), of equal ones the earlier."""
    return entries.by_threads(lambda expert: _largest(entries, expert, count), range(len(entries)))


def prune_smallest(density: float) -> Prune:
    """Return a `Prune` that keeps each tensor's int(density * entries) largest magnitudes, of equal ones the earlier."""
    return lambda entries: keep_largest(entries, int(density * entries.size))


def _largest(entries: Entries, expert: int, count: int) -> Cut:
    if count <= 0:
        return NOTHING
    value, rest, equal = kth_largest([(entries, expert)], count)
    if value == 0.0:
        return EVERYTHING
    if rest == equal:
        return Cut(value, entries.size)
    # find the part of the layer with the last entry kept, then its place in that part
    for rows in entries.blocks(times=BLOCKS_OF_PART):
        if rows.stop == entries.shape[0]:
            break
        _, tied = entries.narrow(expert, value, value, ROOM, rows)
        if rest <= len(tied):
            break
        rest -= len(tied)
    place = _place(partial(entries.magnitudes, expert, rows), value, rest)
    return Cut(value, rows.start * entries.shape[1] + place)


def kth_largest(parts: Sequence[tuple[Entries, int]], count: int) -> tuple[float, int, int]:
    """Return (the `count`-th largest magnitude of an expert's tensors, number of equal entries to keep, number in all).

    `count` is 1 or more; keeping that many equal entries makes `count` in all. If there are fewer entries than `count`, the
    magnitude is 0. A sample brackets the magnitude (Floyd and Rivest 1975); one pass counts the entries above the bracket
    and collects those inside, and another pass follows if the bracket was wrong.
    """
    size = sum(entries.size for entries, _ in parts)
    if count > size:
        return 0.0, 0, 0
    low, high = 0.0, math.inf
    if size > SAMPLED:
        low, high = _bracket(np.concatenate([entries.sample(expert) for entries, expert in parts]), count / size)
    while True:
        above, near = 0, []
        for entries, expert in parts:
            larger, between = entries.narrow(expert, low, high, ROOM + entries.size // 16)
            above += larger
            near.append(between)
        if above >= count:
            low, high = high, math.inf
        elif above + sum(map(len, near)) >= count:
            break
        elif low > 0.0:
            low, high = 0.0, low
        else:
            # NaN entries are in no bracket
            return 0.0, 0, 0
    values, rest = np.concatenate(near), count - above
    place = len(values) - rest
    values.partition(place)
    kth = values[place]
    return float(kth), int(np.count_nonzero(values[place:] == kth)), int(np.count_nonzero(values == kth))


def _bracket(sample: NDArray[np.float32], share: float) -> tuple[float, float]:
    """Return two magnitudes that very likely enclose the magnitude which `share` of all entries reach or exceed."""
    margin = 0.01 + 2.0 / math.sqrt(len(sample))
    places = [round((1.0 - share + move) * len(sample)) for move in (margin, -margin)]
    bounds = [math.inf, 0.0]
    for number, place in enumerate(places):
        if 0 <= place < len(sample):
            # one place at a time, which is faster by far than both in one call
            sample.partition(place)
            bounds[number], sample = float(sample[place]), sample[: place + 1]
    return bounds[1], bounds[0]


def _place(blocks: Blocks, value: float, number: int) -> int:
    """Return the flat index of the `number`-th entry (1 or more) equal to `value`."""
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


# an entry's draw is 16 bits, so a probability is a multiple of 1 / LEVELS
LEVELS = 2**16


def quantise(probability: float) -> int:
    """Return the number of LEVELS nearest to a keep probability, at least 1 unless the probability is 0."""
    return max(1, round(probability * LEVELS)) if probability > 0 else 0


def draws(seed: int, first: int, shape: tuple[int, int]) -> NDArray[np.uint16]:
    """Return 16 random bits for each entry of a block that begins at flat index `first`, a multiple of 4.

    The entry of flat index i has the i-th 16 bits, lower bits first, of the words that SplitMix64 (Steele, Lea and Flood
    2014) generates from the seed.
    """
    size = shape[0] * shape[1]
    # the generator relies on the overflow of 64-bit words
    words = np.arange(first // 4 + 1, first // 4 + 1 + -(-size // 4), dtype=np.uint64) * _STEP + np.uint64(seed)
    for shift, factor in _MIX:
        words ^= words >> shift
        words *= factor
    words ^= words >> np.uint64(31)
    return words.astype("<u8", copy=False).view("<u2")[:size].reshape(shape)


def draws_for(seed: int, rows: slice, block_BI: Tensor) -> NDArray[np.uint16]:
    """Return the `draws`, 16 random bits for each entry, of a block of whole rows."""
    num_rows, width = block_BI.shape
    return draws(seed, rows.start * width, (num_rows, width))


_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def stream(entries: Entries, seeds: Sequence[int], expert: int) -> int:
    """Return the random seed of an expert's tensor, with the top bit set for a bias; `seeds` has 63 bits per expert."""
    return int(seeds[entries.places[expert]]) | (1 << 63 if entries.bias else 0)


@dataclass(frozen=True)
class Drop:
    """A rule that keeps the entries whose 16 random bits are below `level`."""

    seed: int
    level: int

    @property
    def numbers(self) -> Numbers:
        return Numbers(seed=self.seed, level=self.level)

    def apply(self, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        np.multiply(block_BI.numpy(), draws_for(self.seed, rows, block_BI) < self.level, out=out_BI.numpy())


def prune_random(seeds: Sequence[int], density: float) -> tuple[Prune, float]:
    """Return a `Prune` that keeps each entry with probability `density`, and the quantised density (1.0 instead of 0)."""
    level = quantise(density)

    def prune(entries: Entries) -> Sequence[Rule]:
        return [Drop(stream(entries, seeds, expert), level) for expert in range(len(entries))]

    return prune, level / LEVELS if level else 1.0
