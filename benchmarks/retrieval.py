"""How well retrieval finds the right adapter: recall on the pool's tasks, and relations found for unseen tasks.

    python benchmarks/retrieval.py --data DATA                          keys from the first 20 training inputs of each task
    python benchmarks/retrieval.py --data DATA --pool examples/pool     keys from the cards of trained adapters
    python benchmarks/retrieval.py --data DATA --split train            on training rows that no key has seen, for choices

DATA holds pool/*.jsonl and unseen/*.jsonl (rows {task, definition, input, target, split}) and MANIFEST.json. No weights
of adapters are needed. Bare inputs are the hard test: several tasks share the form of their inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loraweave import registry
from loraweave.hub.search import unit
from loraweave.retrieval.embedders.sentence import INSTRUCTION, Sentence
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Record

KS = (1, 3, 5, 10)
INPUTS_PER_KEY = 20
INPUTS_PER_QUERY = 5

# query texts of one task, and a description or "" -> a score per adapter
Scorer = Callable[[Sequence[str], str], np.ndarray]

console = Console()


@dataclass(frozen=True)
class PoolTask:
    """A task with an adapter: what its card says, inputs that the card does not hold, other wordings of its definition."""

    name: str
    description: str
    examples: tuple[str, ...]
    queries: tuple[str, ...]
    wordings: tuple[str, ...]


@dataclass(frozen=True)
class UnseenTask:
    """A task without an adapter, and the pool tasks that are documented as related."""

    name: str
    definition: str
    inputs: tuple[str, ...]
    related: tuple[str, ...]


class CardHub:
    """The part of a hub that a search reads, from cards alone."""

    generation = 0

    def __init__(self, tasks: Sequence[PoolTask]) -> None:
        self._records = [
            Record(task.name, "", "", 0, (), None, (), task.description, 0, "", examples=task.examples) for task in tasks
        ]

    def records(self, **filters: Any) -> list[Record]:
        return self._records

    def vectors(self, embedder_id: str) -> dict[str, tuple[str, np.ndarray]]:
        return {}

    def store_vectors(self, embedder_id: str, rows: Sequence[tuple[str, str, np.ndarray]]) -> None:
        """Nothing is kept."""


class Remembering:
    """An embedder that embeds each text once: the same inputs occur in many queries."""

    def __init__(self, embedder: Any, texts: Sequence[str], label: str) -> None:
        self.dim, self.id = embedder.dim, embedder.id
        self._embedder = embedder
        self._rows: dict[str, np.ndarray] = {}
        ordered = sorted(dict.fromkeys(texts), key=len)
        for start in track(
            range(0, len(ordered), 64),
            description=f"embedding, {label}",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            self.embed(ordered[start : start + 64])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        self._rows.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._rows[text] for text in texts])


def main(
    data: Annotated[Path, typer.Option(help="folder with pool/*.jsonl, unseen/*.jsonl and MANIFEST.json")],
    pool: Annotated[
        Path | None, typer.Option("--pool", "--hub", help="folder of adapter folders whose loraweave.json are the cards")
    ] = None,
    split: Annotated[str, typer.Option(help="rows that queries come from: test, or train for choosing constants")] = "test",
    num_queries: Annotated[int, typer.Option(help="inputs of each task that are used as queries")] = 40,
    instruction: Annotated[str, typer.Option(help="text put before every key and query by the encoder")] = INSTRUCTION,
    seed: Annotated[int, typer.Option(help="of the random groups of five inputs")] = 0,
    out: Annotated[Path | None, typer.Option(help="also write the numbers to this JSON file")] = None,
) -> None:
    """Recall of retrieval on pool tasks, beside random choice, TF-IDF and mean embeddings; relations of unseen tasks."""
    if split not in ("train", "test"):
        raise typer.BadParameter(f"--split is {split!r}; it must be train or test")
    manifest = json.loads((data / "MANIFEST.json").read_text(encoding="utf-8"))["groups"]
    # a pool may hold adapters for some of the tasks only
    entries = [entry for entry in manifest["pool"] if pool is None or (pool / entry["task"] / "loraweave.json").is_file()]
    if not entries:
        raise typer.BadParameter(f"--pool: {pool} has no card <task>/loraweave.json of any pool task of MANIFEST.json")
    tasks = [_pool_task(data, entry, pool, split, num_queries) for entry in entries]
    unseen = [_unseen_task(data, entry, num_queries) for entry in manifest["unseen"]]
    texts = [text for task in tasks for text in (*task.examples, *task.queries, *task.wordings, task.description)]
    texts += [text for task in unseen for text in (*task.inputs, task.definition)]
    encoder = Remembering(Sentence(instruction=instruction), texts, "sentence")
    hashing = Remembering(registry.get("embedders", "hashing")(), texts, "hashing")
    with_form = Remembering(registry.get("embedders", "sentence_form")(instruction=instruction), texts, "sentence_form")
    scorers: dict[str, Scorer] = {
        "TF-IDF of words": _tfidf(tasks),
        "plain mean embedding": _mean_embedding(tasks, encoder, normalised=False),
        "unit mean embedding": _mean_embedding(tasks, encoder, normalised=True),
        "loraweave, hashing": _retriever(tasks, hashing),
        "loraweave, sentence": _retriever(tasks, encoder),
        "loraweave, sentence_form": _retriever(tasks, with_form),
    }
    recalls = {"random": {kind: [min(k / len(tasks), 1.0) for k in KS] for kind in _queries(tasks, seed)}}
    for label, scorer in scorers.items():
        recalls[label] = {kind: _recall(queries, scorer, label, kind) for kind, queries in _queries(tasks, seed).items()}
    console.print(f"{len(tasks)} pool tasks, {num_queries} {split} inputs each, {encoder.id}")
    _print_recalls(recalls)
    relations = _relations(tasks, unseen, scorers["loraweave, sentence"])
    _print_relations(relations)
    if out is not None:
        out.write_text(
            json.dumps({"recall_at": KS, "recalls": recalls, "unseen": relations}, indent=1) + "\n", encoding="utf-8"
        )


def _pool_task(data: Path, entry: dict[str, Any], pool: Path | None, split: str, num_queries: int) -> PoolTask:
    rows = _rows(data / entry["file"])
    train = [row["input"] for row in rows if row["split"] == "train"]
    description, examples = entry["definition"], train[:INPUTS_PER_KEY]
    if pool is not None:
        card = json.loads((pool / entry["task"] / "loraweave.json").read_text(encoding="utf-8"))
        description, examples = card["description"], card["examples"]
    held = set(examples)
    queries = [text for text in train if text not in held] if split == "train" else []
    queries = queries or [row["input"] for row in rows if row["split"] == "test"]
    wordings = dict.fromkeys([entry["definition_long"], *entry["paraphrases"]])
    return PoolTask(
        entry["task"],
        description,
        tuple(examples),
        tuple(queries[:num_queries]),
        tuple(text for text in wordings if text != description),
    )


def _unseen_task(data: Path, entry: dict[str, Any], num_inputs: int) -> UnseenTask:
    inputs = [row["input"] for row in _rows(data / entry["file"]) if row["split"] == "train"]
    return UnseenTask(entry["task"], entry["definition"], tuple(inputs[:num_inputs]), tuple(entry["related"]))


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _queries(tasks: Sequence[PoolTask], seed: int) -> dict[str, list[tuple[int, Sequence[str], str]]]:
    """Kind of query -> (index of the right task, inputs, description)."""
    rng = np.random.default_rng(seed)
    kinds: dict[str, list[tuple[int, Sequence[str], str]]] = {
        "one input": [(number, [text], "") for number, task in enumerate(tasks) for text in task.queries],
        "five inputs": [],
        "five inputs + other wording": [],
        "other wording of the description": [
            (number, [], text) for number, task in enumerate(tasks) for text in task.wordings
        ],
    }
    for number, task in enumerate(tasks):
        for _ in task.queries:
            chosen = rng.choice(len(task.queries), size=min(INPUTS_PER_QUERY, len(task.queries)), replace=False)
            inputs = [task.queries[i] for i in chosen]
            kinds["five inputs"].append((number, inputs, ""))
            if task.wordings:
                wording = task.wordings[int(rng.integers(len(task.wordings)))]
                kinds["five inputs + other wording"].append((number, inputs, wording))
    return kinds


def _tfidf(tasks: Sequence[PoolTask]) -> Scorer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    # single letters and digits are the whole input of some tasks, so they are words too
    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    keys = vectorizer.fit_transform(["\n".join((*task.examples, task.description)) for task in tasks])

    def score(inputs: Sequence[str], description: str) -> np.ndarray:
        query = vectorizer.transform(["\n".join((*inputs, description))])
        scores: np.ndarray = np.asarray((query @ keys.T).todense())[0]
        return scores

    return score


def _mean_embedding(tasks: Sequence[PoolTask], embedder: Remembering, *, normalised: bool) -> Scorer:
    keys_ND = np.stack([embedder.embed(task.examples).astype(np.float64).mean(axis=0) for task in tasks])
    if normalised:
        keys_ND /= np.linalg.norm(keys_ND, axis=1, keepdims=True)

    def score(inputs: Sequence[str], description: str) -> np.ndarray:
        texts = [*inputs, description] if description else list(inputs)
        scores: np.ndarray = keys_ND @ unit(embedder.embed(texts).mean(axis=0))
        return scores

    return score


def _retriever(tasks: Sequence[PoolTask], embedder: Remembering) -> Scorer:
    retriever = Retriever(CardHub(tasks), embedder=embedder)  # type: ignore[arg-type]
    position = {task.name: number for number, task in enumerate(tasks)}

    def score(inputs: Sequence[str], description: str) -> np.ndarray:
        scores = np.empty(len(tasks))
        for candidate in retriever.for_task(inputs, description=description, k=len(tasks)):
            scores[position[candidate.name]] = candidate.score
        return scores

    return score


def _recall(queries: Sequence[tuple[int, Sequence[str], str]], scorer: Scorer, label: str, kind: str) -> list[float]:
    ranks = []
    for number, inputs, description in track(
        queries, description=f"{label}, {kind}", console=console, transient=True, disable=not console.is_terminal
    ):
        order = np.argsort(-scorer(inputs, description), kind="stable")
        ranks.append(int(np.flatnonzero(order == number)[0]))
    return [float(np.mean(np.array(ranks) < k)) for k in KS]


def _relations(tasks: Sequence[PoolTask], unseen: Sequence[UnseenTask], scorer: Scorer) -> dict[str, Any]:
    """The top 5 of each unseen task, and the rates over groups of five inputs of the tasks that have relations."""
    rows, rates = [], {}
    for with_definition in (False, True):
        first, within = [], []
        for task in unseen:
            description = task.definition if with_definition else ""
            for start in range(0, len(task.inputs) - INPUTS_PER_QUERY + 1, INPUTS_PER_QUERY):
                scores = scorer(task.inputs[start : start + INPUTS_PER_QUERY], description)
                top = [tasks[i].name for i in np.argsort(-scores, kind="stable")[:5]]
                if start == 0:
                    best = [[name, round(float(score), 3)] for name, score in zip(top, -np.sort(-scores), strict=False)]
                    rows.append([task.name, list(task.related), with_definition, best])
                if task.related:
                    first.append(top[0] in task.related)
                    within.append(set(task.related) <= set(top[:3]))
        label = "five inputs + definition" if with_definition else "five inputs"
        rates[label] = {"related is first": float(np.mean(first)), "all related within 3": float(np.mean(within))}
    return {"tasks": rows, "rates": rates}


def _print_recalls(recalls: dict[str, dict[str, list[float]]]) -> None:
    for kind in next(iter(recalls.values())):
        table = Table(title=f"query: {kind}")
        table.add_column("method")
        for k in KS:
            table.add_column(f"recall@{k}", justify="right")
        for label, numbers in recalls.items():
            table.add_row(label, *(f"{value:.3f}" for value in numbers[kind]))
        console.print(table)


def _print_relations(relations: dict[str, Any]) -> None:
    for with_definition, label in ((False, "five inputs"), (True, "five inputs + definition")):
        table = Table("unseen task", "related (documented)", "found (score)", title=f"query: {label}")
        for name, related, has_definition, top in relations["tasks"]:
            if has_definition == with_definition:
                marked = [f"[b]{hit}[/b] {score:.2f}" if hit in related else f"{hit} {score:.2f}" for hit, score in top]
                table.add_row(name, ", ".join(related) or "none", ", ".join(marked))
        console.print(table)
        console.print(", ".join(f"{what}: {value:.2f}" for what, value in relations["rates"][label].items()))


if __name__ == "__main__":
    typer.run(main)
