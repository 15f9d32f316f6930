"""The squared coefficient of variation of how much experts are used."""

from __future__ import annotations

from torch import Tensor


def cv_squared(use: Tensor) -> Tensor:
    """Return the variance of all entries, none below 0, over their squared mean (Shazeer et al. 2017, arXiv 1701.06538).

    0 where all are alike, and their number where one has everything. The variance is that of a sample, divided by one less
    than the number, as in code that followed the paper.
    """
    if use.numel() == 1:
        return use.sum() * 0
    # for a use of nothing at all
    return use.var() / (use.mean().square() + 1e-10)
