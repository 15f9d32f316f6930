"""Random masks that depend on a seed and an entry's place alone, not on blocks, threads, device or order of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loraweave.composer.merge.methods._entries import Entries, Numbers, Prune, Rule

# an entry's draw is 16 bits, so a probability is a multiple of 1 / LEVELS
LEVELS = 2**16


def quantise(probability: float) -> int:
    """Return the number of LEVELS that a keep probability comes to: the nearest, 0 for zero alone."""
    return max(1, round(probability * LEVELS)) if probability > 0 else 0


def draws(seed: int, first: int, shape: tuple[int, int]) -> NDArray[np.uint16]:
    """Return 16 bits for each entry of a block from flat index `first` on, a multiple of 4.

    Entry number i has the i-th 16 bits, the lower ones first, of the words of SplitMix64 (Steele, Lea and Flood 2014) from
    that seed on.
    """
    size = shape[0] * shape[1]
    # overflow is what the generator is made of
    words = np.arange(first // 4 + 1, first // 4 + 1 + -(-size // 4), dtype=np.uint64) * _STEP + np.uint64(seed)
    for shift, factor in _MIX:
        words ^= words >> shift
        words *= factor
    words ^= words >> np.uint64(31)
    return words.astype("<u8", copy=False).view("<u2")[:size].reshape(shape)


def draws_for(seed: int, rows: slice, block_BI: Tensor) -> NDArray[np.uint16]:
    """Return the `draws` for a block of whole rows."""
    num_rows, width = block_BI.shape
    return draws(seed, rows.start * width, (num_rows, width))


_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


def stream(entries: Entries, seeds: Sequence[int], expert: int) -> int:
    """Return the seed of an expert's tensor; a bias has another. `seeds` are those of the experts given, 63 bits each."""
    return int(seeds[entries.places[expert]]) | (1 << 63 if entries.bias else 0)


@dataclass(frozen=True)
class Drop:
    """A rule that keeps the entries whose draw is below a level."""

    seed: int
    level: int

    @property
    def numbers(self) -> Numbers:
        return Numbers(seed=self.seed, level=self.level)

    def apply(self, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        np.multiply(block_BI.numpy(), draws_for(self.seed, rows, block_BI) < self.level, out=out_BI.numpy())


def prune_random(seeds: Sequence[int], density: float) -> tuple[Prune, float]:
    """Return a `Prune` that keeps each entry with probability `density`, and that as quantised (1 where it is zero)."""
    level = quantise(density)

    def prune(entries: Entries) -> Sequence[Rule]:
        return [Drop(stream(entries, seeds, expert), level) for expert in range(len(entries))]

    return prune, level / LEVELS if level else 1.0
