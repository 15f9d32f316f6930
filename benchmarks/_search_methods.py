"""Ways to score a pool's adapters for a query, for `retrieval`: loraweave's, and what they are compared with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import loraweave as lw
from loraweave.hub.search import unit
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
    hub: lw.Hub, embedder: Remembering, keys: Sequence[str] = (), fusion: Fusion | None = None, *, examples: bool = False
) -> Scorer:
    """loraweave's Retriever: `for_task`, or `for_examples` for queries with outputs when `examples`."""
    retriever = lw.Retriever(hub, embedder=embedder, keys=keys, fusion=fusion)
    names = [record.name for record in hub.records()]
    position = {name: number for number, name in enumerate(names)}

    def score(ask: Ask) -> np.ndarray:
        if examples and ask.outputs:
            pairs = list(zip(ask.inputs, ask.outputs, strict=True))
            found = retriever.for_examples(pairs, description=ask.description, k=len(names))
        else:
            found = retriever.for_task(ask.inputs, description=ask.description, k=len(names))
        scores = np.full(len(names), -np.inf)
        for candidate in found:
            scores[position[candidate.name]] = candidate.score
        return scores

    return score


def _document(task: PoolTask) -> str:
    return "\n".join((*(text for text, _ in task.examples), task.description))
