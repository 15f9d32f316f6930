"""TIES-merging as published (Yadav et al. 2023, arXiv 2306.01708): trim over the whole model, elect signs, merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from loraweave.common.options import Fraction
from loraweave.composer.merge.method_call import DenseUpdate, Experts, Term, Weights, surveys, terms
from loraweave.composer.merge.methods._entries import Entries, Rule, merge_elected, tensors, vote
from loraweave.composer.merge.methods._pruning import EVERYTHING, NOTHING, Cut, kth_largest
from loraweave.registry import traits


@dataclass(frozen=True, eq=False)
class Survey:
    """The survey that TIES makes of all layers: each expert's cut, and the sign that most entries of the model elect."""

    layers: Sequence[Sequence[Term]]
    cuts: Mapping[int, Cut]

    def trim(self, entries: Entries) -> Sequence[Rule]:
        """Return each expert's rule, which keeps the entries whose magnitude reaches the expert's cut."""
        return list(map(self.cuts.__getitem__, entries.places))

    @cached_property
    def majority(self) -> float:
        """The sign of the majority: 1 when at least as many entries elect a positive sign as elect a negative one, else -1.

        Only sums that cancel exactly need it, which is rare, so it is counted when the first one turns up.
        """
        balance = 0
        for terms_E in self.layers:
            for entries in tensors(terms_E):
                rules = self.trim(entries)
                counted = entries.merge(rules, entries.weights, torch.empty(entries.shape), elects=True, weighted=True)
                if counted is not None:
                    balance += counted.balance
                    continue
                for _, stack_EBI in entries.stacks(rules):
                    weighted_EN = stack_EBI.reshape(len(entries), -1) * torch.tensor(entries.weights)[:, None]
                    balance += int(vote(weighted_EN, "total").sign_().sum())
        return 1.0 if balance >= 0 else -1.0


def survey_of(layers: Iterable[Experts], weights: Weights, *, density: Fraction = 0.2) -> Survey:
    """Return the survey with each expert's k-th largest magnitude over all layers as its cut."""
    kept: list[list[Term]] = []
    parts: dict[int, list[tuple[Entries, int]]] = {}
    size = 0
    for experts in layers:
        kept.append(terms(experts, weights))
        for entries in tensors(kept[-1]):
            size += entries.size
            for expert, place in enumerate(entries.places):
                parts.setdefault(place, []).append((entries, expert))
    # rounded down, as PEFT and mergekit do
    count = int(density * size)
    if count == 0 or count == size:
        return Survey(kept, dict.fromkeys(parts, EVERYTHING if count else NOTHING))
    return Survey(kept, {place: Cut(kth_largest(part, count)[0], math.inf) for place, part in parts.items()})


@surveys(survey_of)
@traits("lossy")
def ties(
    experts: Experts,
    weights: Weights,
    *,
    density: Fraction = 0.2,
    aggregate: Literal["mean", "sum"] = "mean",
    scale: float = 1.0,
    survey: Survey | None = None,
) -> DenseUpdate:
    """Return one layer's TIES merge, trimmed over the whole model, as in the paper and its authors' code.

    1. Trim: of each expert's entries in all layers together (biases too), keep those whose magnitude is at least the
       k-th largest, k = int(density * entries), an absent layer counting as zeros; equal magnitudes are kept together.
    2. Elect: gamma = sign of the sum over experts of w_e tau_e; where that is exactly zero, the sign that most entries of
       the whole model have, 1 if those balance.
    3. Merge: scale * the mean (`aggregate`="mean", the paper's) or sum of w_e tau_e over the experts with sign gamma.

    Weights of one are the paper, and `scale` is its lambda; the authors' code keeps one entry more. Without `survey` this
    layer is the whole model. fp32 products, votes in float64. PEFT's TIES is `ties_per_layer`, mergekit's `ties_weighted`,
    the one with counted signs `ties_count`.
    """
    model = survey_of([experts], weights, density=density) if survey is None else survey
    return merge_elected(experts, weights, model.trim, aggregate=aggregate, scale=scale, tie=lambda: model.majority)
