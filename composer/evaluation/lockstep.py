"""Objectives that are asked together: the folds of a cross-validation search in step, in one forward pass for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from loraweave.composer.evaluation.example_loss import ExampleLoss, scored, scored_with_gradients
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.objective import Objective

Candidates = Sequence[MixtureWeights]


def together(objectives: Sequence[Objective], candidates: Sequence[Candidates]) -> list[list[float]]:
    """The losses that each objective gives its own candidates; views of one ExampleLoss share their forward passes."""
    if _are_views_of_one(objectives):
        losses = iter(scored(_pairs(objectives, candidates)))
        return [_next(losses, own) for own in candidates]
    return [list(objective(own)) if own else [] for objective, own in zip(objectives, candidates, strict=True)]


def together_with_gradients(
    objectives: Sequence[Any], candidates: Sequence[Candidates]
) -> list[tuple[list[float], list[Tensor]]]:
    """The losses and gradients of each objective's own candidates, in the same way."""
    if _are_views_of_one(objectives):
        found = iter(scored_with_gradients(_pairs(objectives, candidates)))
        parts = [_next(found, own) for own in candidates]
        return [([loss for loss, _ in part], [gradient for _, gradient in part]) for part in parts]
    return [objective.gradients(own) if own else ([], []) for objective, own in zip(objectives, candidates, strict=True)]


def _are_views_of_one(objectives: Sequence[Any]) -> bool:
    """Whether all are of one model, of the same encoded examples, and mean the same by a candidate."""
    first = objectives[0] if objectives else None
    return isinstance(first, ExampleLoss) and all(
        isinstance(each, ExampleLoss) and each.encoded is first.encoded and each.merge_method == first.merge_method
        for each in objectives
    )


def _pairs(objectives: Sequence[Any], candidates: Sequence[Candidates]) -> list[tuple[ExampleLoss, MixtureWeights]]:
    return [(objective, each) for objective, own in zip(objectives, candidates, strict=True) for each in own]


def _next(found: Iterator[Any], own: Candidates) -> list[Any]:
    return [next(found) for _ in own]
