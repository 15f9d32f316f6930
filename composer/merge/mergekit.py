"""mergekit's merges of task vectors, on the updates of adapters: what remains of each has a density of its own.

Its `GeneralizedTaskArithmetic` (mergekit 0.1.5) with W + B A for the fine-tuned weights: thin out each update, weigh it,
let signs be elected or not, divide by the weights or not, scale by lambda. Randomness is ours: seeds, not torch's stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loraweave.composer.merge.methods._dropout import prune_random
from loraweave.composer.merge.methods._entries import Entries, Keep, Prune, sum_pruned
from loraweave.composer.merge.methods._signs import merge_elected
from loraweave.composer.merge.methods._terms import Experts, Weights
from loraweave.composer.merge.methods._thresholds import prune_smallest
from loraweave.composer.merge.methods.breadcrumbs import prune_both_ends
from loraweave.composer.merge.methods.della import magprune
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.errors import CompositionError

# a norm below it is not rescaled
TINY = 1e-7


@dataclass(frozen=True)
class Kin:
    """A method of this family: how updates are thinned out, whether signs are elected, mergekit's defaults."""

    thinning: str
    elects: bool
    normalize: bool = False
    rescale: bool = False
    # its own parameter of each model, and the default
    extra: tuple[str, float] | None = None


KIN = {
    "task_arithmetic": Kin("nothing", False),
    "ties": Kin("magnitude", True, normalize=True),
    "dare_ties": Kin("random", True, rescale=True),
    "dare_linear": Kin("random", False, rescale=True),
    "breadcrumbs": Kin("outliers", False, extra=("gamma", 0.01)),
    "breadcrumbs_ties": Kin("outliers", True, extra=("gamma", 0.01)),
    "della": Kin("rank", True, normalize=True, rescale=True, extra=("epsilon", 0.15)),
    "della_linear": Kin("rank", False, rescale=True, extra=("epsilon", 0.15)),
}


def mergekit(
    experts: Experts,
    weights: Weights,
    *,
    seeds: Sequence[int],
    of: str,
    densities: Any,
    extras: Any,
    normalize: bool,
    rescale: bool,
    scale: float,
) -> DenseUpdate:
    """One layer's merge by the method `of` KIN; `densities` and `extras` (gamma or epsilon) are those of the experts.

    tau_e is what is left of delta_e; with `rescale` it is multiplied by |delta_e|_1 / |tau_e|_1, matrix and bias apart.
    With elected signs the result is scale * sum of w_e tau_e over the experts for which it has the sign of the sum of all,
    by `normalize` divided by the sum of their w_e; else it is scale * sum of w_e tau_e, divided by the sum of all w_e. A
    divisor of 0 is 1.
    """
    kin = KIN[of]
    if kin.thinning == "rank" and any(each is not None and each.kind != "linear" for each in experts):
        raise CompositionError(
            "mergekit ranks entries within rows of a weight, and a layer that is not linear has others here"
        )
    prune = _thinned(kin.thinning, densities, extras, seeds)
    if rescale:
        prune = _with_norm(prune)
    if kin.elects:
        return merge_elected(experts, weights, prune, divide="weights" if normalize else "nothing", scale=scale)
    total = sum(weights)
    return sum_pruned(experts, weights, prune, scale=scale / (total if normalize and abs(total) >= 1e-8 else 1.0))


def _thinned(thinning: str, densities: Sequence[float], extras: Sequence[float], seeds: Sequence[int]) -> Prune:
    """Each expert by its own numbers, which go by its place among those given."""

    def of_place(place: int) -> Prune:
        density, extra = densities[place], extras[place]
        if density >= 1.0:
            return prune_smallest(1.0)
        match thinning:
            case "magnitude":
                return prune_smallest(density)
            case "random":
                return prune_random(seeds, density)[0]
            case "outliers":
                return prune_both_ends(density, extra)
        return lambda entries, scratch_OI: magprune(entries, seeds, density, extra, rescale=False)

    def prune(entries: Entries, scratch_OI: Tensor) -> Keep:
        keeps = [of_place(place)(entries, scratch_OI) for place in entries.places]

        def keep(expert: int, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
            keeps[expert](expert, rows, block_BI, out_BI)

        return keep

    return prune


def _with_norm(prune: Prune) -> Prune:
    """What is left of each expert's tensor, multiplied so that its sum of magnitudes is that of the whole."""

    def rescaled(entries: Entries, scratch_OI: Tensor) -> Keep:
        before_E, after_E = _norms(entries, None), _norms(entries, prune(entries, scratch_OI))
        factors_E = [b / a if min(a, b) >= TINY else 1.0 for b, a in zip(before_E, after_E, strict=True)]
        # draws are asked for in order, once: these are the same again
        plain = prune(entries, scratch_OI)

        def keep(expert: int, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
            plain(expert, rows, block_BI, out_BI)
            out_BI.mul_(factors_E[expert])

        return keep

    return rescaled


def _norms(entries: Entries, keep: Keep | None) -> list[float]:
    sums = [0.0] * len(entries)
    for _, stack_EBI in entries.stacks(keep):
        for expert, block_BI in enumerate(stack_EBI):
            sums[expert] += float(block_BI.abs().double().sum())
    return sums
