"""Merges of the factors themselves, as PEFT has them: one rule on the a of all experts, and again on their b.

The weights enter as roots, sqrt(|w|) on both sides and the sign on a, so that a single expert of weight w gives w D. For
several, a of one expert meets b of another, and the result depends on how updates are split into factors.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend.merging import Term

# the first step on each expert's tensor: (tensor, index of the expert) -> tensor
Prune = Callable[[Tensor, int], Tensor]
# the merge of the experts' tensors: (tensors with the experts' axis in front, weights) -> tensor
Combine = Callable[[Tensor, Tensor], Tensor]


def merge_rooted(found: Sequence[Term], combine: Combine, prune: Prune = lambda tensor, place: tensor) -> Factors:
    """Return one layer's a and b merged by `combine` with weights sqrt|w_e|, signed on a, and its bias with w_e; in fp32.

    `prune` is applied first to each expert's tensor.
    """
    w_E = torch.tensor([term.weight for term in found], dtype=torch.float64)
    root_E = w_E.abs().sqrt()

    def merged(tensors: Sequence[Tensor], weight_E: Tensor) -> Tensor:
        pruned = [prune(tensor, term.place) for tensor, term in zip(tensors, found, strict=True)]
        return combine(torch.stack(pruned).double(), weight_E).float()

    # always a, b, bias in this order: a random rule draws from one stream for each expert
    a_RI = merged([term.factors.a_RI for term in found], root_E * w_E.sign())
    b_OR = merged([term.factors.b_OR for term in found], root_E)
    bias_O = None
    if any(term.factors.bias_O is not None for term in found):
        zeros_O = b_OR.new_zeros(b_OR.shape[0])
        bias_O = merged([zeros_O if term.factors.bias_O is None else term.factors.bias_O for term in found], w_E)
    return replace(found[0].factors, a_RI=a_RI, b_OR=b_OR, bias_O=bias_O)


def largest(density: float) -> Prune:
    """Return a `Prune` that keeps a tensor's int(density * size) entries of largest magnitude, of equal ones the first."""

    def prune(tensor: Tensor, place: int) -> Tensor:
        if density >= 1.0:
            return tensor
        order = tensor.abs().flatten().argsort(descending=True, stable=True)
        kept = order[: int(density * tensor.numel())]
        result = torch.zeros_like(tensor).flatten()
        result[kept] = tensor.flatten()[kept]
        return result.view_as(tensor)

    return prune


def random_rescaled(density: float, seeds: Sequence[int]) -> Prune:
    """Return a `Prune` that keeps entries with probability `density`, divided by it (0: zeros).

    Each expert draws from a random stream of its own seed.
    """
    streams = [np.random.Philox(key=seed) for seed in seeds]

    def prune(tensor: Tensor, place: int) -> Tensor:
        if density == 0.0:
            return torch.zeros_like(tensor)
        # the upper 53 bits as a number in [0, 1)
        draws = (streams[place].random_raw(tensor.numel()) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        mask = torch.from_numpy(draws < density).view_as(tensor)
        return tensor.double() * mask / density

    return prune


def weighted_sum(tensors: Tensor, weight_E: Tensor) -> Tensor:
    return torch.einsum("e...,e->...", tensors, weight_E)


def disjoint_mean(majority: str) -> Combine:
    """Return PEFT's TIES rule: the weighted sum of the entries that have the elected sign, divided by their number.

    The sign is that of the sum of the unweighted entries ("total") or of their signs ("frequency"), + for 0; zeros have no
    sign and do not count.
    """

    def combine(tensors: Tensor, weight_E: Tensor) -> Tensor:
        votes = tensors if majority == "total" else tensors.sign()
        elected = torch.where(votes.sum(dim=0) >= 0.0, 1.0, -1.0)
        agree = tensors.sign() == elected
        return weighted_sum(tensors * agree, weight_E) / agree.sum(dim=0).clamp(min=1)

    return combine
