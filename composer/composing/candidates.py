"""The experts that compose() chooses among: what retrieval finds in a hub, or the pool that was given."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from loraweave.errors import WeightingError
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.types import BaseKey, Task


def experts_of(given: Any) -> Hub | ExpertPool:
    """The hub or the pool; a list or a mapping of adapters as a pool. Raises WeightingError for anything else."""
    if isinstance(given, str | PathLike):
        raise WeightingError(f"adapters are chosen from a hub, and {str(given)!r} is its path: pass lw.Hub({str(given)!r})")
    return given if isinstance(given, Hub | ExpertPool) else ExpertPool(given)


def candidates(
    hub_or_pool: Hub | ExpertPool, task: Task, unlabelled: Sequence[str], k: int, base: BaseKey | None
) -> tuple[ExpertPool | None, dict[str, float]]:
    """The pool to search in, None where the hub has nothing for this base, and each retrieved adapter's score."""
    if isinstance(hub_or_pool, ExpertPool):
        return hub_or_pool, {}
    inputs = [text for text, _ in task.examples] or list(unlabelled)
    hits = Retriever(hub_or_pool).for_task(inputs, description=task.instruction, k=k, base_model=base, evidence=False)
    scores = {hit.name: hit.score for hit in hits}
    return (hub_or_pool.pool(list(scores)) if scores else None), scores
