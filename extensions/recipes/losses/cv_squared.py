"""The squared coefficient of variation of the experts' use."""

from torch import Tensor


def cv_squared(use: Tensor) -> Tensor:
    """Return the variance of all entries, none below 0, over their squared mean (Shazeer et al. 2017, arXiv 1701.06538).

    0 if all are equal, and their number if only one is not 0. The variance is that of a sample, divided by one less than the
    number, as in code that followed the paper.
    """
    if use.numel() == 1:
        return use.sum() * 0
    # avoids a division by 0 if no expert is used
    return use.var() / (use.mean().square() + 1e-10)
