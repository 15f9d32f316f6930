"""Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795): a sum of updates without their extreme entries."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.extend import Fraction, traits
from loraweave.extend.merging import Cut, DenseUpdate, Entries, Experts, Prune, Rule, Weights, keep_largest, sum_pruned


@traits("lossy")
def breadcrumbs(
    experts: Experts, weights: Weights, *, density: Fraction = 0.9, gamma: Fraction = 0.01, scale: float = 1.0
) -> DenseUpdate:
    """Return one layer's scale * sum of w_e tau_e, tau_e being an update without its outliers and its small entries.

    Of an expert's n entries in a layer, by magnitude (of equal ones the earlier first), the first int(gamma * n) are
    dropped, the next int(density * n) kept, the rest dropped; where that exceeds n, fewer outliers are dropped. So does
    mergekit's `breadcrumbs`, without a sign election; the paper states both masks as percentiles. `scale` is the paper's
    alpha. fp32 products.
    """
    return sum_pruned(experts, weights, prune_both_ends(density, gamma), scale=scale)


@dataclass(frozen=True)
class Between:
    """A rule that keeps what `reach` keeps and `outliers` does not."""

    reach: Cut
    outliers: Cut
    numbers: None = None

    def apply(self, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        outliers_BI = torch.empty_like(block_BI)
        self.reach.apply(rows, block_BI, out_BI)
        self.outliers.apply(rows, block_BI, outliers_BI)
        # both are the same numbers or zeros, so the difference is exact
        out_BI.sub_(outliers_BI)


def prune_both_ends(density: float, gamma: float) -> Prune:
    """Return a `Prune` that drops each tensor's int(gamma * n) largest entries and keeps the next int(density * n)."""

    def prune(entries: Entries) -> Sequence[Rule]:
        target = int(density * entries.size)
        reach = min(entries.size, target + int(gamma * entries.size))
        return list(map(Between, keep_largest(entries, reach), keep_largest(entries, reach - target)))

    return prune
