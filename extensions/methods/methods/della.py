"""DELLA (Deep et al. 2024, arXiv 2406.11617): drop by rank of magnitude, elect signs, fuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from loraweave import WeightingError
from loraweave.extend import Fraction, traits
from loraweave.extend.merging import (
    LEVELS,
    DenseUpdate,
    Entries,
    Experts,
    Rule,
    Weights,
    draws_for,
    merge_elected,
    quantise,
    stream,
)


@traits("lossy")
def della(
    experts: Experts,
    weights: Weights,
    *,
    seeds: Sequence[int],
    density: Fraction = 0.5,
    epsilon: Fraction = 0.15,
    aggregate: Literal["mean", "sum"] = "mean",
    scale: float = 1.0,
) -> DenseUpdate:
    """Return one layer's DELLA merge: MAGPRUNE on each update, then the sign election and disjoint merge of `ties`.

    MAGPRUNE keeps an entry with probability p and divides it by p. Within a row of I entries, p rises linearly with the
    rank of the magnitude, from density - epsilon for the smallest to density + epsilon for the largest (of equal ones the
    earlier ranks lower; p = density for I = 1), rounded to a multiple of 2^-16. A bias is one row. Then gamma = sign of the
    sum of w_e tau_e, 1 where that is zero, and the result is scale * the mean or sum (`aggregate`) of w_e tau_e over the
    experts with sign gamma. Weights of one are the paper; `scale` is its lambda, and its window is 2 epsilon wide.

    A `density` of 0 gives zeros and 1 drops nothing, whatever epsilon; between them density - epsilon must be above 0 and
    density + epsilon at most 1. Masks depend on seeds[e] and an entry's place alone. fp32 products, votes in float64.
    mergekit's `della` rescales to the L1 norm of the update.
    """
    if density in (0.0, 1.0):
        epsilon = 0.0
    elif density - epsilon <= 0.0 or density + epsilon > 1.0:
        raise WeightingError(
            f"della: density={density!r} and epsilon={epsilon!r} give probabilities from {density - epsilon:.6g} to "
            f"{density + epsilon:.6g}, outside (0, 1]: epsilon must be below density and at most 1 - density"
        )

    def prune(entries: Entries) -> Sequence[Rule]:
        return magprune(entries, seeds, density, epsilon)

    return merge_elected(experts, weights, prune, aggregate=aggregate, scale=scale)


def magprune(
    entries: Entries, seeds: Sequence[int], density: float, epsilon: float, *, rescale: bool = True
) -> Sequence[Rule]:
    """Return one rule per expert that keeps an entry with a probability that rises with its magnitude's rank in the row.

    The probability goes from density - epsilon to density + epsilon; with `rescale` kept entries are divided by it.
    """
    width = entries.shape[1]
    rising = np.linspace(-1.0, 1.0, width) if width > 1 else np.zeros(width)
    level_of_rank_I = torch.tensor([float(quantise(density + epsilon * step)) for step in rising])
    return [Ranked(stream(entries, seeds, expert), level_of_rank_I, rescale) for expert in range(len(entries))]


@dataclass(frozen=True, eq=False)
class Ranked:
    """A rule that keeps an entry if its random draw is below the level of its rank by magnitude in the row, 0 the least."""

    seed: int
    level_of_rank_I: Tensor
    rescale: bool
    numbers: None = None

    def apply(self, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        level_BI = torch.empty_like(block_BI)
        level_BI.scatter_(1, _ascending(block_BI), self.level_of_rank_I.expand_as(block_BI))
        kept = draws_for(self.seed, rows, block_BI) < level_BI.numpy()
        if self.rescale:
            # a level of zero keeps nothing, and divides nothing
            block_BI = torch.div(block_BI, level_BI.div_(LEVELS).clamp_(min=1 / LEVELS), out=out_BI)
        np.multiply(block_BI.numpy(), kept, out=out_BI.numpy())


def _ascending(block_BI: Tensor) -> Tensor:
    """Return each row's column indices (B, I) in ascending order of magnitude, of equal ones the earlier first.

    The bits of a magnitude above those of the column make one integer, so that an ordinary sort, which is fast, is stable.
    """
    halves = np.empty((*block_BI.shape, 2), dtype="<u4")
    halves[..., 0] = np.arange(block_BI.shape[1])
    halves[..., 1] = np.abs(block_BI.numpy()).view(np.uint32)
    halves.view("<u8")[..., 0].sort(axis=1)
    return torch.from_numpy(halves[..., 0].astype(np.int64))
