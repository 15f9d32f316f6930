"""The loss of a gate that shall know the domain of what it sees."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def domain(scores_NE: Tensor, domain_N: Tensor) -> Tensor:
    """The cross-entropy of softmax(scores) with the place of each one's own expert, a mean over those that have one.

    A `domain_N` below 0 is not known and takes no part; 0 where none is known. log(E) where all experts are alike, 0 where
    each has all its probability on its own expert, and without a bound where it has it on another.
    """
    known_N = domain_N >= 0
    if not known_N.any():
        return scores_NE.sum() * 0
    return functional.cross_entropy(scores_NE[known_N], domain_N[known_N])
