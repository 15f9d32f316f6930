"""Random masks that depend on a seed and an entry's place alone, not on blocks, threads, device or order of experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loraweave.composer.merge.methods._entries import ROW_GROUP, Entries, Keep, Prune

# an entry's draw is 16 bits, so a probability is a multiple of 1 / LEVELS
LEVELS = 2**16


def quantise(probability: float) -> int:
    """The number of LEVELS that a keep probability comes to: the nearest, 0 for zero alone."""
    return max(1, round(probability * LEVELS)) if probability > 0 else 0


class Draws:
    """16 random bits for each entry of each expert: entry number i has the i-th 16 bits of its expert's Philox stream.

    `seeds` are those of the experts first given, 63 bits each; a bias has a stream of its own. The blocks of an expert
    must be asked for in order, each once.
    """

    def __init__(self, entries: Entries, seeds: Sequence[int]) -> None:
        part = 1 if entries.bias else 0
        self._streams = [np.random.Philox(key=(part << 64) + int(seeds[place])) for place in entries.places]

    def block(self, expert: int, block_BI: Tensor) -> NDArray[np.uint16]:
        """The draws of the next block, in its shape."""
        size = block_BI.numel()
        raw = self._streams[expert].random_raw(-(-size // ROW_GROUP))
        return raw.astype("<u8", copy=False).view("<u2")[:size].reshape(tuple(block_BI.shape))


def prune_random(seeds: Sequence[int], density: float) -> tuple[Prune, float]:
    """Keeps each entry with a probability of `density`, and that probability as quantised (1 where it is zero)."""
    level = quantise(density)

    def prune(entries: Entries, scratch_OI: Tensor) -> Keep:
        draws = Draws(entries, seeds)

        def keep(expert: int, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
            if level == LEVELS:
                out_BI.copy_(block_BI)
            elif level == 0:
                out_BI.zero_()
            else:
                np.multiply(block_BI.numpy(), draws.block(expert, block_BI) < level, out=out_BI.numpy())

        return keep

    return prune, level / LEVELS if level else 1.0
