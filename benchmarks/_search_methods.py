"""Ways to score a pool's adapters for a query, loraweave's and others, and what they find for tasks without an adapter."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import loraweave as lw
from benchmarks._run import RESAMPLES
from loraweave.hub.embedders._embedder import unit
from loraweave.retrieval.fusion import Fusion

# BM25 as usual: Robertson and Zaragoza 2009
K1, B = 1.2, 0.75


@dataclass(frozen=True)
class PoolTask:
    """A task with an adapter: what its card says, examples that the card does not hold, other wordings of its definition."""

    name: str
    description: str
    examples: tuple[tuple[str, str], ...]
    queries: tuple[tuple[str, str], ...]
    wordings: tuple[str, ...]


@dataclass(frozen=True)
class Ask:
    """A query: inputs, outputs beside them or none, a description or none."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    description: str = ""


# a score per adapter
Scorer = Callable[[Ask], np.ndarray]


class Remembering:
    """An embedder that embeds each text once: the same inputs occur in many queries."""

    def __init__(self, embedder: Any, texts: Sequence[str]) -> None:
        self.dim, self.id = embedder.dim, embedder.id
        self._embedder = embedder
        self._rows: dict[str, np.ndarray] = {}
        self.embed(sorted(dict.fromkeys(texts), key=len))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if new:
            self._rows.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._rows[text] for text in texts])


@contextmanager
def card_hub(tasks: Sequence[PoolTask]) -> Iterator[lw.Hub]:
    """A hub of adapters with these cards and tiny random factors: searches by text read nothing else."""
    with TemporaryDirectory() as folder, lw.Hub(folder) as hub:
        for task in tasks:
            generator = torch.Generator().manual_seed(zlib.crc32(task.name.encode()))
            factors = lw.Factors(torch.randn(1, 3, generator=generator), torch.randn(2, 1, generator=generator))
            card = {"outputs": [output for _, output in task.examples]}
            hub.add(
                lw.Adapter(task.name, "none", {"layer": factors}, card=card),
                description=task.description,
                examples=[text for text, _ in task.examples],
                # a search with one of these filters does not see the adapter of that task
                tags=[f"not {other.name}" for other in tasks if other is not task],
            )
        yield hub


def chance(tasks: Sequence[PoolTask], seed: int) -> Scorer:
    rng = np.random.default_rng(seed)
    return lambda ask: rng.random(len(tasks))


def tfidf(tasks: Sequence[PoolTask]) -> Scorer:
    """Cosine of TF-IDF vectors of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # single letters and digits are the whole input of some tasks, so they are words too
    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    keys = vectorizer.fit_transform([_document(task) for task in tasks])

    def score(ask: Ask) -> np.ndarray:
        query = vectorizer.transform(["\n".join((*ask.inputs, ask.description))])
        scores: np.ndarray = np.asarray((query @ keys.T).todense())[0]
        return scores

    return score


def bm25(tasks: Sequence[PoolTask]) -> Scorer:
    """Okapi BM25 over one document an adapter: its sample inputs and its description."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    counts_NW = vectorizer.fit_transform([_document(task) for task in tasks]).toarray().astype(np.float64)
    lengths_N1 = counts_NW.sum(axis=1, keepdims=True)
    holding_W = (counts_NW > 0).sum(axis=0)
    idf_W = np.log(1 + (len(tasks) - holding_W + 0.5) / (holding_W + 0.5))
    saturated_NW = counts_NW * (K1 + 1) / (counts_NW + K1 * (1 - B + B * lengths_N1 / lengths_N1.mean()))

    def score(ask: Ask) -> np.ndarray:
        asked_W = vectorizer.transform(["\n".join((*ask.inputs, ask.description))]).toarray()[0]
        scores: np.ndarray = saturated_NW @ (idf_W * asked_W)
        return scores

    return score


def mean_embedding(tasks: Sequence[PoolTask], embedder: Remembering, *, normalised: bool) -> Scorer:
    """Plain sentence-embedding search: the mean of the sample inputs, as it is or at norm 1."""
    keys_ND = np.stack(
        [embedder.embed([text for text, _ in task.examples]).astype(np.float64).mean(axis=0) for task in tasks]
    )
    if normalised:
        keys_ND /= np.linalg.norm(keys_ND, axis=1, keepdims=True)

    def score(ask: Ask) -> np.ndarray:
        texts = [*ask.inputs, ask.description] if ask.description else list(ask.inputs)
        scores: np.ndarray = keys_ND @ unit(embedder.embed(texts).mean(axis=0))
        return scores

    return score


def learner(rows: Sequence[Sequence[str]], embedder: Remembering) -> Scorer:
    """Logistic regression on many inputs of every task, far more than a card holds: about the most that inputs can tell."""
    from sklearn.linear_model import LogisticRegression

    features_ND = np.concatenate([embedder.embed(inputs) for inputs in rows])
    owners_N = np.repeat(np.arange(len(rows)), [len(inputs) for inputs in rows])
    # C chosen on training rows: 3 to 30 make no difference
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features_ND, owners_N)

    def score(ask: Ask) -> np.ndarray:
        if not ask.inputs:
            return np.full(len(rows), -np.inf)
        # inputs are independent given the task
        scores: np.ndarray = model.predict_log_proba(embedder.embed(ask.inputs)).sum(axis=0)
        return scores

    return score


def searched(
    hub: lw.Hub,
    embedder: Remembering,
    keys: Sequence[str] | None = (),
    fusion: Fusion | None = None,
    *,
    examples: bool = False,
) -> Scorer:
    """loraweave's Retriever: `for_task`, or `for_examples` for queries with outputs when `examples`; keys None: its own."""
    retriever = lw.Retriever(hub, embedder=embedder, keys=keys, fusion=fusion)
    names = [record.name for record in hub.records()]
    position = {name: number for number, name in enumerate(names)}

    def score(ask: Ask) -> np.ndarray:
        if examples and ask.outputs:
            pairs = list(zip(ask.inputs, ask.outputs, strict=True))
            found = retriever.for_examples(pairs, description=ask.description, k=len(names))
        else:
            found = retriever.for_task(ask.inputs, description=ask.description, k=len(names), evidence=False)
        scores = np.full(len(names), -np.inf)
        for candidate in found:
            scores[position[candidate.name]] = candidate.score
        return scores

    return score


def _document(task: PoolTask) -> str:
    return "\n".join((*(text for text, _ in task.examples), task.description))


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


def missing(
    retriever: lw.Retriever, tasks: Sequence[PoolTask], sizes: Sequence[int] = (1, 5)
) -> dict[int, tuple[list[list[float]], list[list[float]]]]:
    """By inputs per query and task: the best scores of its queries in the whole hub, and without its own adapter."""
    found: dict[int, tuple[list[list[float]], list[list[float]]]] = {size: ([], []) for size in sizes}
    for task in tasks:
        texts = [text for text, _ in task.queries]
        for size in sizes:
            groups = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
            for part, tags in zip(found[size], ((), f"not {task.name}"), strict=True):
                hits = [retriever.for_task(group, k=1, tags=tags, evidence=False) for group in groups]
                part.append([some[0].score for some in hits])
    return found


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
