"""The z-loss, which keeps scores small."""

from torch import Tensor


def z(scores_NE: Tensor) -> Tensor:
    """Return the mean of logsumexp(scores)^2 over the real tokens of one layer (Zoph et al. 2022, arXiv 2202.08906).

    The loss is log(E)^2 where all scores are 0, and nears the square of the highest score where it is far above the others.
    """
    return scores_NE.logsumexp(dim=1).square().mean()
