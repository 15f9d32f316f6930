"""The experts that compose() chooses among: what retrieval finds in a hub, or the pool that was given."""

from __future__ import annotations

from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.types import BaseKey, Task


def candidates(
    hub_or_pool: Hub | ExpertPool, task: Task, k: int, base: BaseKey | None
) -> tuple[ExpertPool | None, dict[str, float]]:
    """The pool to search in, None where the hub has nothing for this base, and each retrieved adapter's score."""
    if isinstance(hub_or_pool, ExpertPool):
        return hub_or_pool, {}
    inputs = [text for text, _ in task.examples]
    hits = Retriever(hub_or_pool).for_task(inputs, description=task.instruction, k=k, base_model=base, evidence=False)
    scores = {hit.name: hit.score for hit in hits}
    return (hub_or_pool.pool(list(scores)) if scores else None), scores
