"""TIES and its kin: prune, elect signs, merge what agrees; the places where the versions differ are arguments.

A method of this family is a file with its formula, its source and its defaults, which calls `merge_elected`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraweave.composer.merge.methods._entries import Entries, Prune, merged
from loraweave.composer.merge.methods._terms import Experts, Weights, terms
from loraweave.composer.merge.updates import DenseUpdate

# sums of fp32 numbers are zero or at least 2^-149, so this decides zeros alone
FEATHER = 2.0**-200


def merge_elected(
    experts: Experts,
    weights: Weights,
    prune: Prune,
    *,
    weighted: bool = True,
    majority: str = "total",
    divide: str = "count",
    scale: float = 1.0,
    tie: Callable[[], float] | None = None,
) -> DenseUpdate:
    """Return one layer's scale * (sum of w_e * tau_e over the experts that agree with the elected sign) / divisor.

    tau_e is what `prune` leaves of expert e. The sign is that of the sum over experts of the votes, taken in float64:
    w_e tau_e when `weighted`, tau_e otherwise, or their signs when `majority` is "frequency". An expert agrees where its
    vote has the elected sign; zeros never do. The divisor is the number of experts that agree (`divide`="count"), the
    sum of their "weights", or 1 ("nothing"); where it is zero, 1. `tie()` gives the sign, 1 or -1, of a sum that is zero
    although somebody voted; it is called only when that happens.
    """

    options: dict[str, Any] = {
        "elects": True,
        "weighted": weighted,
        "counts": majority == "frequency",
        "divides": ("nothing", "count", "weights").index(divide),
        "scale": scale,
    }

    def rule(entries: Entries, out_OI: Tensor) -> None:
        rules = prune(entries)
        made = entries.merge(rules, entries.weights, out_OI, tie=1.0, **options)
        if made is not None:
            if made.cancelled and tie is not None and tie() < 0:
                entries.merge(rules, entries.weights, out_OI, tie=-1.0, **options)
            return
        weights_E = torch.tensor(entries.weights)
        for rows, stack_EBI in entries.stacks(rules):
            stack_EN = stack_EBI.reshape(len(entries), -1)
            if weighted:
                # before the sum, and not within it: a fused product would leave a rounding error of x - x
                stack_EN.mul_(weights_E[:, None])
            sums_N = vote(stack_EN, majority)
            cancelled = tie is not None and _cancelled(stack_EN, sums_N)
            sign_N = decide(sums_N, tie() if tie is not None and cancelled else 1.0)
            agreeing_EN = stack_EN.mul_(sign_N).relu_()
            result_N = (agreeing_EN.sum(dim=0) if weighted else weights_E @ agreeing_EN).mul_(sign_N)
            if divide != "nothing":
                present_EN = agreeing_EN.sign_()
                result_N.div_(divisor(present_EN.sum(dim=0) if divide == "count" else weights_E @ present_EN))
            out_OI[rows] = result_N.mul_(scale).view(stack_EBI.shape[1:])

    return merged(terms(experts, weights), rule)


def divisor_of(aggregate: str) -> str:
    """Return what a merge divides by for a "mean" or a "sum"."""
    return "count" if aggregate == "mean" else "nothing"


def vote(stack_EN: Tensor, majority: str) -> Tensor:
    """Return the sum over experts of the entries, or of their signs, in float64."""
    if majority == "frequency":
        return stack_EN.sign().sum(dim=0).double()
    return stack_EN.sum(dim=0, dtype=torch.float64)


def decide(sums_N: Tensor, tie: float) -> Tensor:
    """Return the sign of each sum, 1 or -1 in fp32; that of `tie` for zeros. The sums are overwritten."""
    return sums_N.add_(tie * FEATHER).sign_().float()


def divisor(sums_N: Tensor) -> Tensor:
    """Return the sums, with zeros replaced by 1 in place, so that 0 / 0 is 0."""
    sums = sums_N.numpy()
    # numpy's comparisons are many times faster than torch's on a CPU
    np.add(sums, sums == 0, out=sums)
    return sums_N


def _cancelled(stack_EN: Tensor, sums_N: Tensor) -> bool:
    """Return whether a sum is zero although an expert's entry is not."""
    silent = sums_N.numpy() == 0
    silent &= stack_EN.amax(dim=0).numpy() > 0
    return bool(silent.any())
