"""Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795): neither the largest entries nor the smallest."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.common.options import Fraction
from loraweave.composer.merge.methods._entries import Entries, Keep, Prune, sum_pruned
from loraweave.composer.merge.methods._terms import Experts, Weights
from loraweave.composer.merge.methods._thresholds import count_of, keep_largest
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.registry import traits


@traits("lossy")
def breadcrumbs(
    experts: Experts, weights: Weights, *, density: Fraction = 0.9, gamma: Fraction = 0.01, scale: float = 1.0
) -> DenseUpdate:
    """One layer's scale * sum of w_e tau_e, tau_e being an update without its outliers and its small entries.

    Of an expert's n entries in a layer, by magnitude (of equal ones the earlier first), the first int(gamma * n) are
    dropped, the next int(density * n) kept, the rest dropped; where that exceeds n, fewer outliers are dropped. So does
    mergekit's `breadcrumbs`, without a sign election; the paper states both masks as percentiles. `scale` is the paper's
    alpha. fp32 products.
    """
    return sum_pruned(experts, weights, prune_both_ends(density, gamma), scale=scale)


def prune_both_ends(density: float, gamma: float) -> Prune:
    """Drops the int(gamma * n) largest entries of each expert's tensor, and keeps the int(density * n) that follow."""

    def prune(entries: Entries, scratch_OI: Tensor) -> Keep:
        target = count_of(density, entries.size)
        reach = min(entries.size, target + count_of(gamma, entries.size))
        keep_reach = keep_largest(entries, reach, scratch_OI)
        keep_outliers = keep_largest(entries, reach - target, scratch_OI)
        outliers_BI = torch.empty(0)

        def keep(expert: int, rows: slice, block_BI: Tensor, left_BI: Tensor) -> None:
            nonlocal outliers_BI
            if outliers_BI.shape != block_BI.shape:
                outliers_BI = torch.empty_like(block_BI)
            keep_reach(expert, rows, block_BI, left_BI)
            keep_outliers(expert, rows, block_BI, outliers_BI)
            # both are the same numbers or zeros, so the difference is exact
            left_BI.sub_(outliers_BI)

        return keep

    return prune
