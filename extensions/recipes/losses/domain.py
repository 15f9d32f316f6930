"""The loss of a gate that has to predict the domain of its input."""

from torch import Tensor
from torch.nn import functional


def domain(scores_NE: Tensor, domain_N: Tensor) -> Tensor:
    """Return the mean cross-entropy between softmax(scores) and each row's expert, over the rows that have one.

    A `domain_N` below 0 means that the row has none; without any, the loss is 0. It is log(E) for equal scores, 0 if each
    row gives all its probability to its expert, and unbounded if to another.
    """
    known_N = domain_N >= 0
    if not known_N.any():
        return scores_NE.sum() * 0
    return functional.cross_entropy(scores_NE[known_N], domain_N[known_N])
