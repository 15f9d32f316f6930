"""The loss of a gate that has to know the domain of its input."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def domain(scores_NE: Tensor, domain_N: Tensor) -> Tensor:
    """Return the cross-entropy of softmax(scores) with the row's own expert, a mean over the rows that have one.

    A row with `domain_N` below 0 has none; 0 where no row has one. log(E) where all experts are alike, 0 where each row has
    all its probability on its own expert, and without a bound where it has it on another.
    """
    known_N = domain_N >= 0
    if not known_N.any():
        return scores_NE.sum() * 0
    return functional.cross_entropy(scores_NE[known_N], domain_N[known_N])
