"""Adapters' scores on known tasks, weighted by how similar the query is to each task (LoRAuter)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from loraweave import LoraweaveError, Record, RetrievalError
from loraweave.extend import Declared, Positive, is_number, traits
from loraweave.extend.hubs import KeySpace, Query


@traits("relative")
class Validation(Declared):
    """An adapter's mean score over the tasks, each task weighted by its similarity to the query.

    `tasks` names some inputs of each task; without it, tasks are the adapters themselves, by their sample inputs. Cards hold
    the scores as `task_scores`, {task: number from 0 to 1}. A low `temperature` lets the nearest task decide.
    """

    noun: ClassVar[str] = "key"
    error: ClassVar[type[LoraweaveError]] = RetrievalError

    def __init__(self, *, tasks: Mapping[str, Sequence[str]] | None = None, temperature: Positive = 0.05) -> None:
        self.tasks = None if tasks is None else {name: tuple(inputs) for name, inputs in tasks.items()}
        self.temperature = temperature

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        inputs = self.tasks
        if inputs is None:
            inputs = {record.name: record.examples for record in records if len(space.samples(record))}
        scores_NT = np.array([[_score(record, task) for task in inputs] for record in records], dtype=np.float64)
        if not query.inputs or not inputs:
            return np.full(len(records), np.nan)
        query_D = space.mean(space.embed(query.inputs))
        similar_T = np.array([query_D @ space.mean(space.embed(texts)) for texts in inputs.values()])
        weights_T = np.exp((similar_T - similar_T.max()) / self.temperature)
        # a task that an adapter was not scored on says nothing about it
        known_NT = np.isfinite(scores_NT)
        shares_N = known_NT @ weights_T
        sums_N = np.where(known_NT, scores_NT, 0.0) @ weights_T
        return np.where(known_NT.any(axis=1), sums_N / np.where(shares_N > 0, shares_N, 1.0), np.nan)


def _score(record: Record, task: str) -> float:
    # a card may have any JSON
    match record.card.get("task_scores"):
        case Mapping() as scores if is_number(scores.get(task), 0, 1):
            return float(scores[task])
    return np.nan
