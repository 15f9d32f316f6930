"""Trained heads in a merge: whole tensors that replace the base's, so that a sum of them is a choice, never a default."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loraweave.errors import CompositionError, LayerMismatch, WeightingError
from loraweave.hub.adapter import Adapter

CHOICES = ("error", "first", "average")


def merged_heads(used: Sequence[tuple[Adapter, float]], choice: str) -> dict[str, Tensor]:
    """The heads of a merge of these adapters, which are in the order that the user gave, with their weights.

    One adapter of weight 1 keeps its heads. Otherwise "first" takes each head from the first adapter that has it,
    "average" the sum of w_e h_e over the sum of w_e, over the adapters that have it, and "error" refuses.
    Raises WeightingError for another choice or weights that sum to zero, CompositionError for heads under "error",
    LayerMismatch for an average of heads of different shape.
    """
    if choice not in CHOICES:
        raise WeightingError(f"heads={choice!r} is none of {', '.join(map(repr, CHOICES))}")
    having: dict[str, list[tuple[Adapter, float]]] = {}
    for adapter, weight in used:
        for head in adapter.heads:
            having.setdefault(head, []).append((adapter, weight))
    if len(used) == 1 and used[0][1] == 1.0:
        return dict(used[0][0].heads)
    if having and choice == "error":
        listed = "; ".join(f"{head!r} in {', '.join(repr(a.name) for a, _ in owners)}" for head, owners in having.items())
        raise CompositionError(
            f"trained heads replace the base's weights and do not add up: {listed}. Choose heads='first' (the first "
            "adapter's) or heads='average' (their weighted mean)"
        )
    if choice == "first":
        return {head: owners[0][0].heads[head] for head, owners in having.items()}
    return {head: _mean(head, owners) for head, owners in having.items()}


def _mean(head: str, owners: Sequence[tuple[Adapter, float]]) -> Tensor:
    first = owners[0][0]
    for adapter, _ in owners:
        if adapter.heads[head].shape != first.heads[head].shape:
            raise LayerMismatch(
                f"head {head!r} has shape {tuple(first.heads[head].shape)} in {first.name!r} and "
                f"{tuple(adapter.heads[head].shape)} in {adapter.name!r}, so there is no average; use heads='first'"
            )
    total = sum(weight for _, weight in owners)
    if total == 0.0:
        raise WeightingError(f"the weights of the adapters with head {head!r} sum to 0, so there is no average")
    summed = sum(adapter.heads[head].double() * weight for adapter, weight in owners)
    return (summed / total).float()  # type: ignore[union-attr]
