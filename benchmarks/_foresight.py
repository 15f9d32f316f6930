"""What a search finds for tasks without an adapter: documented relatives, and adapters that were measured to help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import loraweave as lw
from benchmarks._run import RESAMPLES
from benchmarks._search_methods import Ask, PoolTask, Scorer

INPUTS_PER_QUERY = 5


@dataclass(frozen=True)
class UnseenTask:
    """A task without an adapter, and the pool tasks that are documented as related."""

    name: str
    definition: str
    examples: tuple[tuple[str, str], ...]
    related: tuple[str, ...]

    def asks(self, *, description: bool = False, outputs: bool = False) -> list[Ask]:
        """Queries of five examples each, in their order."""
        starts = range(0, len(self.examples) - INPUTS_PER_QUERY + 1, INPUTS_PER_QUERY)
        groups = [tuple(zip(*self.examples[start : start + INPUTS_PER_QUERY], strict=True)) for start in starts]
        return [Ask(group[0], group[1] if outputs else (), self.definition if description else "") for group in groups]


def relations(tasks: Sequence[PoolTask], unseen: Sequence[UnseenTask], scorer: Scorer) -> dict[str, Any]:
    """The top 5 of each unseen task, and the rates over groups of five inputs of the tasks that have relations."""
    rows, rates = [], {}
    for with_definition in (False, True):
        first, within = [], []
        for task in unseen:
            for number, ask in enumerate(task.asks(description=with_definition)):
                scores_N = scorer(ask)
                top = [tasks[i].name for i in np.argsort(-scores_N, kind="stable")[:5]]
                if number == 0:
                    best = [[name, round(float(score), 3)] for name, score in zip(top, -np.sort(-scores_N), strict=False)]
                    rows.append([task.name, list(task.related), with_definition, best])
                if task.related:
                    first.append(top[0] in task.related)
                    within.append(set(task.related) <= set(top[:3]))
        label = "5 inputs + definition" if with_definition else "5 inputs"
        rates[label] = {"related is first": float(np.mean(first)), "all related within 3": float(np.mean(within))}
    return {"tasks": rows, "rates": rates}


def abstention(
    retriever: lw.Retriever, tasks: Sequence[PoolTask], unseen: Sequence[UnseenTask], sizes: Sequence[int] = (1, 5)
) -> list[dict[str, Any]]:
    """How a calibrated threshold does on rows and on tasks that it was not calibrated with.

    Foreign are the unseen tasks without a documented relation. "half of the rows": thresholds from the even rows of every
    foreign task, checked on the odd ones. A task: the threshold is from the other foreign tasks, and it is checked.
    """
    foreign = {task.name: [text for text, _ in task.examples] for task in unseen if not task.related}
    own = [text for task in tasks for text, _ in task.queries[::2]]
    checked_own = [text for task in tasks for text, _ in task.queries[1::2]]
    rows = []
    for size in sizes:
        even = [text for texts in foreign.values() for text in texts[::2]]
        odd = [text for texts in foreign.values() for text in texts[1::2]]
        found = retriever.calibrate(own, even, inputs_per_query=size)
        passed, accepted = (_passed(retriever, texts, size) for texts in (odd, checked_own))
        rows.append(
            {
                "inputs": size,
                "left out": "half of the rows",
                "threshold": found.threshold,
                "foreign": passed,
                "own": accepted,
            }
        )
        for name, texts in foreign.items():
            others = [text for other, some in foreign.items() if other != name for text in some]
            found = retriever.calibrate(own, others, inputs_per_query=size)
            passed, accepted = (_passed(retriever, some, size) for some in (texts, checked_own))
            rows.append({"inputs": size, "left out": name, "threshold": found.threshold, "foreign": passed, "own": accepted})
    retriever.abstention = None
    return rows


def _passed(retriever: lw.Retriever, texts: Sequence[str], size: int) -> float:
    groups = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
    return float(np.mean([bool(retriever.for_task(group, k=1)) for group in groups]))


def foresight(
    tasks: Sequence[PoolTask],
    unseen: Sequence[UnseenTask],
    scorers: Mapping[str, Scorer],
    measured: Mapping[str, Any],
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """By kind of query and method: the mean Spearman correlation with the gains, and the gains of the first and best of 5.

    Intervals are 95 %, by bootstrap over the unseen tasks. The oracle knows the gains.
    """
    gains = {task.name: np.array([measured["tasks"][task.name]["gains"][t.name] for t in tasks]) for task in unseen}
    asks = {
        "5 inputs": {task.name: task.asks() for task in unseen},
        "5 examples": {task.name: task.asks(outputs=True) for task in unseen},
        "5 examples + definition": {task.name: task.asks(description=True, outputs=True) for task in unseen},
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, by_task in asks.items():
        found[kind] = {label: _foreseen(by_task, scorer, gains, seed) for label, scorer in scorers.items()}
        best = {name: float(np.max(gains_N)) for name, gains_N in gains.items()}
        mean = float(np.mean(list(best.values())))
        found[kind]["oracle"] = {"spearman": 1.0, "interval": [1.0, 1.0], "first": mean, "best_of_5": mean, "tasks": {}}
    return found


def _foreseen(
    asks: Mapping[str, Sequence[Ask]], scorer: Scorer, gains: Mapping[str, np.ndarray], seed: int
) -> dict[str, Any]:
    from scipy.stats import spearmanr

    figures: dict[str, np.ndarray] = {}
    for name, queries in asks.items():
        rows = []
        for ask in queries:
            scores_N = scorer(ask)
            order = np.argsort(-scores_N, kind="stable")
            # a method that scores all alike orders nothing
            constant = np.ptp(scores_N) == 0
            correlation = 0.0 if constant else float(spearmanr(scores_N, gains[name]).statistic)
            rows.append([correlation, gains[name][order[0]], gains[name][order[:5]].max()])
        figures[name] = np.mean(rows, axis=0)
    values_T3 = np.stack(list(figures.values()))
    rng = np.random.default_rng(seed)
    drawn = [values_T3[rng.integers(len(values_T3), size=len(values_T3)), 0].mean() for _ in range(RESAMPLES)]
    spearman, first, best_of_5 = (float(value) for value in values_T3.mean(axis=0))
    return {
        "spearman": spearman,
        "interval": [float(value) for value in np.quantile(drawn, (0.025, 0.975))],
        "first": first,
        "best_of_5": best_of_5,
        "tasks": {name: round(float(row_3[0]), 3) for name, row_3 in figures.items()},
    }
