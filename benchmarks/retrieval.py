"""How well retrieval finds the right adapter: recall on the pool's tasks, and whether it foresees who helps an unseen task.

    python -m benchmarks --data DATA retrieval recall              keys from the cards of the trained adapters of --pool
    python -m benchmarks --data DATA retrieval recall --no-cards   keys from the first 20 training rows of each task
    python -m benchmarks --data DATA retrieval recall --split train   on training rows that no key has seen, for choices
    python -m benchmarks --data DATA retrieval classifier          the default search against the index alone
    python -m benchmarks --data DATA retrieval gains               how much each adapter helps each unseen task

DATA holds pool/*.jsonl and unseen/*.jsonl (rows {task, definition, input, target, split}) and MANIFEST.json. Keys come from
training rows alone, queries from test rows; nothing is fitted on any row of a task but its stored samples. Bare inputs are
the hard test: several tasks share the form of their inputs, and some the inputs. Intervals are 95 %, by bootstrap over the
queries of each task.

Own task hidden: a gain is the base model's mean loss per example on the first test rows of a task, in nats, less the loss
with the one adapter of the pool at weight 1; data/gains.json keeps them, so that an interrupted run goes on, and --fresh
measures all of them again. The rank correlation (Spearman) of a candidate list with these gains says whether the list
foresees them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.progress import track

import loraweave as lw
from benchmarks._data import DATA
from benchmarks._run import Run, Table, console, pairs
from benchmarks._search_methods import (
    Ask,
    PoolTask,
    Remembering,
    Scorer,
    UnseenTask,
    abstention,
    bm25,
    card_hub,
    chance,
    foresight,
    learner,
    mean_embedding,
    missing,
    relations,
    searched,
    tfidf,
)
from loraweave import registry
from loraweave.composer.model.batches import batch, encode, mean_losses
from loraweave.retrieval.retriever import EXAMPLE_KEYS

KS = (1, 3, 5, 10)
INPUTS_PER_KEY = 20
NUM_FIT = 30
NUM_DRAWS = 1000

app = typer.Typer()


@app.command()
def recall(
    context: typer.Context,
    cards: Annotated[bool, typer.Option(help="keys from the cards of --pool")] = True,
    split: Annotated[Literal["test", "train"], typer.Option(help="rows of the queries; train to choose by")] = "test",
    num_queries: Annotated[int, typer.Option(help="rows of each task that are used as queries", min=5)] = 40,
    ceiling: Annotated[bool, typer.Option("--ceiling", help="also a classifier trained on all training rows")] = False,
) -> None:
    """Recall on pool tasks, beside random choice, BM25, TF-IDF and mean embeddings; foresight on unseen tasks."""
    run: Run = context.obj
    pool = run.pool if cards else None
    # a pool may hold adapters for some of the tasks only
    entries = [
        entry for name, entry in run.entries("pool").items() if pool is None or (pool / name / "loraweave.json").is_file()
    ]
    if not entries:
        raise typer.BadParameter(f"--pool: {pool} has no card <task>/loraweave.json of any pool task of MANIFEST.json")
    tasks = [_pool_task(run, entry, pool, split, num_queries) for entry in entries]
    unseen = [_unseen_task(run, entry, num_queries) for entry in run.entries("unseen").values()]
    with card_hub(tasks) as hub:
        encoders = _encoders(tasks, unseen)
        scorers = _scorers(hub, tasks, encoders, run.seed)
        if ceiling:
            scorers["learner of all rows"] = _learner(run, entries)
        console.print(f"{len(tasks)} pool tasks, {num_queries} {split} rows each")
        for kind, asked in _queries(tasks, run.seed):
            run.show(_recalls(kind, asked, scorers, run.seed))
        run.show(*_relations(relations(tasks, unseen, scorers["loraweave, sentence_form"])))
        gains = json.loads((DATA / "gains.json").read_text(encoding="utf-8"))
        run.show(*_foresight(foresight(tasks, unseen, scorers, gains, run.seed)))
        run.show(_abstention(abstention(lw.Retriever(hub, embedder=encoders["sentence_form"], keys=()), tasks, unseen)))


@app.command()
def classifier(
    context: typer.Context,
    split: Annotated[Literal["test", "train"], typer.Option(help="rows of the queries; train to choose by")] = "test",
    num_queries: Annotated[int, typer.Option(help="rows of each task that are used as queries", min=5)] = 40,
    num_missing: Annotated[int, typer.Option(help="of these, with its adapter missing", min=5)] = 20,
) -> None:
    """The default search against the index alone: recall, and whether it sees that the adapter is missing."""
    run: Run = context.obj
    tasks = [_pool_task(run, entry, run.pool, split, num_queries) for entry in run.entries("pool").values()]
    with card_hub(tasks) as hub:
        pairs_ = [pair for task in tasks for pair in (*task.examples, *task.queries)]
        wordings = [text for task in tasks for text in (*task.wordings, task.description)]
        with console.status("embedding"):
            embedder = Remembering(
                registry.get("embedders", "sentence")(), [text for pair in pairs_ for text in pair] + wordings
            )
        scorers = {
            "TF-IDF of words": tfidf(tasks),
            "index alone": searched(hub, embedder),
            "index, keys mean, outputs, relation": searched(hub, embedder, EXAMPLE_KEYS, examples=True),
            "default: the classifier": searched(hub, embedder, None, examples=True),
        }
        for kind, asked in _queries(tasks, run.seed):
            if not kind.startswith(("20", "other")):
                run.show(_recalls(kind, asked, scorers, run.seed, against="index alone"))
        few = [replace(task, queries=task.queries[:num_missing]) for task in tasks]
        retrievers = {
            "index alone": lw.Retriever(hub, embedder=embedder, keys=()),
            "default": lw.Retriever(hub, embedder=embedder),
        }
        seen = {label: missing(retriever, few) for label, retriever in retrievers.items()}
        run.show(_missing(seen, retrievers["default"], run.seed), _sureness(tasks, retrievers["default"]))


def _encoders(tasks: Sequence[PoolTask], unseen: Sequence[UnseenTask]) -> dict[str, Remembering]:
    known = [pair for task in tasks for pair in (*task.examples, *task.queries)]
    known += [pair for task in unseen for pair in task.examples]
    texts = [text for pair in known for text in pair]
    texts += [text for task in tasks for text in (*task.wordings, task.description)] + [task.definition for task in unseen]
    with console.status("embedding"):
        names = ("sentence", "sentence_form", "hashing")
        return {name: Remembering(registry.get("embedders", name)(), texts) for name in names}


def _scorers(hub: lw.Hub, tasks: Sequence[PoolTask], encoders: dict[str, Remembering], seed: int) -> dict[str, Scorer]:
    form = encoders["sentence_form"]
    return {
        "random": chance(tasks, seed),
        "BM25": bm25(tasks),
        "TF-IDF of words": tfidf(tasks),
        "plain mean embedding": mean_embedding(tasks, encoders["sentence"], normalised=False),
        "unit mean embedding": mean_embedding(tasks, encoders["sentence"], normalised=True),
        "loraweave, hashing": searched(hub, encoders["hashing"]),
        "loraweave, sentence": searched(hub, encoders["sentence"]),
        "loraweave, sentence_form": searched(hub, form),
        "same, key mean": searched(hub, form, ("mean",)),
        "same, by examples": searched(hub, form, examples=True),
    }


def _learner(run: Run, entries: Sequence[dict[str, Any]]) -> Scorer:
    rows = [run.rows(entry["task"]) for entry in entries]
    inputs = [[row["input"] for row in task if row["split"] == "train"] for task in rows]
    with console.status("embedding all training rows"):
        return learner(
            inputs,
            Remembering(registry.get("embedders", "sentence_form")(), [row["input"] for task in rows for row in task]),
        )


def _pool_task(run: Run, entry: dict[str, Any], pool: Path | None, split: str, num_queries: int) -> PoolTask:
    rows = run.rows(entry["task"])
    train = pairs(rows, "train")
    description, examples = entry["definition"], train[:INPUTS_PER_KEY]
    if pool is not None:
        card = json.loads((pool / entry["task"] / "loraweave.json").read_text(encoding="utf-8"))
        description, examples = card["description"], list(zip(card["examples"], card["outputs"], strict=True))
    # the rows that weights of several keys were learned from are no queries, so that figures can be compared with those
    held = {text for text, _ in (*examples, *train[: INPUTS_PER_KEY + NUM_FIT])}
    queries = [pair for pair in train if pair[0] not in held] if split == "train" else []
    queries = queries or pairs(rows, "test")
    wordings = dict.fromkeys([entry["definition_long"], *entry["paraphrases"]])
    others = tuple(text for text in wordings if text != description)
    return PoolTask(entry["task"], description, tuple(examples), tuple(queries[:num_queries]), others)


def _unseen_task(run: Run, entry: dict[str, Any], num_rows: int) -> UnseenTask:
    examples = pairs(run.rows(entry["task"]), "train")[:num_rows]
    return UnseenTask(entry["task"], entry["definition"], tuple(examples), tuple(entry["related"]))


def _queries(tasks: Sequence[PoolTask], seed: int) -> Iterator[tuple[str, list[tuple[int, Ask]]]]:
    """Kind of query, and (index of the right task, query) of each; the same groups of rows for inputs and for examples."""
    for size in (1, 5, 20):
        rng = np.random.default_rng(seed)
        inputs, examples = [], []
        for number, task in enumerate(tasks):
            for row in range(len(task.queries)):
                rows = [row] if size == 1 else rng.choice(len(task.queries), min(size, len(task.queries)), replace=False)
                given, outputs = zip(*(task.queries[i] for i in rows), strict=True)
                inputs.append((number, Ask(given)))
                examples.append((number, Ask(given, outputs)))
        yield f"{size} input{'s' * (size > 1)}", inputs
        if size < 20:
            yield f"{size} example{'s' * (size > 1)}", examples
    five = [(number, wording, task) for number, task in enumerate(tasks) for wording in task.wordings]
    yield (
        "5 inputs + other wording of the description",
        [(number, Ask(tuple(text for text, _ in task.queries[:5]), (), wording)) for number, wording, task in five],
    )
    yield "other wording of the description", [(number, Ask((), (), wording)) for number, wording, _ in five]


def _hits(queries: Sequence[tuple[int, Ask]], scorer: Scorer) -> np.ndarray:
    """Whether each query finds its adapter within each of KS (Q, K); (0,) for a method that cannot tell."""
    ranks_Q = []
    for number, ask in queries:
        scores_N = scorer(ask)
        if np.isneginf(scores_N).all():
            return np.empty(0)
        # ties are drawn, not given to the first: which task stands first is no merit
        ranks_Q.append(int((scores_N > scores_N[number]).sum()) + ((scores_N == scores_N[number]).sum() - 1) / 2)
    hits_QK: np.ndarray = np.array(ranks_Q)[:, None] < np.array(KS)
    return hits_QK


def _shares(queries: Sequence[tuple[int, Ask]], hits_QK: np.ndarray, seed: int) -> list[list[float]]:
    """[mean, low, high] at each of KS; intervals by bootstrap over the queries of each task."""
    tasks_Q = np.array([number for number, _ in queries])
    rng = np.random.default_rng(seed)
    groups = [hits_QK[tasks_Q == task] for task in np.unique(tasks_Q)]
    drawn_DK = sum(rows_GK[rng.integers(len(rows_GK), size=(NUM_DRAWS, len(rows_GK)))].sum(axis=1) for rows_GK in groups)
    low_K, high_K = np.quantile(drawn_DK / len(hits_QK), (0.025, 0.975), axis=0)
    return [[float(value) for value in found] for found in zip(hits_QK.mean(axis=0), low_K, high_K, strict=True)]


def _recalls(
    kind: str, asked: Sequence[tuple[int, Ask]], scorers: dict[str, Scorer], seed: int, *, against: str = ""
) -> Table:
    """With `against`, a label, also the difference to that method."""
    table = Table(f"query: {kind}", ("method", *(f"recall@{k}" for k in KS), *(f"gain at {k}" for k in KS if against)))
    shown = track(scorers.items(), kind, console=console, transient=True, disable=not console.is_terminal)
    hits = {label: _hits(asked, scorer) for label, scorer in shown}
    for label, hits_QK in hits.items():
        if len(hits_QK):
            cells = [f"{value:.3f} ({low:.3f}-{high:.3f})" for value, low, high in _shares(asked, hits_QK, seed)]
            if against:
                gains = _shares(asked, hits_QK.astype(float) - hits[against], seed)
                cells += [f"{value:+.3f} ({low:+.3f} to {high:+.3f})" for value, low, high in gains]
            table.add(label, *cells)
    return table


def _relations(related: dict[str, Any]) -> Iterator[Table]:
    for with_definition, label in ((False, "5 inputs"), (True, "5 inputs + definition")):
        rates = ", ".join(f"{what}: {value:.2f}" for what, value in related["rates"][label].items())
        table = Table(f"query: {label}; {rates}", ("unseen task", "related (documented)", "found (score)"))
        for name, documented, has_definition, top in related["tasks"]:
            if has_definition == with_definition:
                marked = [f"**{hit}** {score:.2f}" if hit in documented else f"{hit} {score:.2f}" for hit, score in top]
                table.add(name, ", ".join(documented) or "none", ", ".join(marked))
        yield table


def _foresight(foreseen: dict[str, dict[str, dict[str, Any]]]) -> Iterator[Table]:
    for kind, by_method in foreseen.items():
        table = Table(f"unseen tasks, {kind}", ("method", "Spearman", "gain of the first", "best of the first 5"))
        for label, found in by_method.items():
            low, high = found["interval"]
            spearman = f"{found['spearman']:.2f} ({low:.2f}-{high:.2f})"
            table.add(label, spearman, f"{found['first']:.2f}", f"{found['best_of_5']:.2f}")
        yield table


def _abstention(rows: list[dict[str, Any]]) -> Table:
    table = Table("abstention, target 0.05", ("inputs", "left out", "threshold", "foreign let through", "own kept"))
    for row in rows:
        figures = (f"{row[key]:.3f}" for key in ("threshold", "foreign", "own"))
        table.add(str(row["inputs"]), row["left out"], *figures)
    return table


def _missing(
    seen: dict[str, dict[int, tuple[list[list[float]], list[list[float]]]]], default: lw.Retriever, seed: int
) -> Table:
    """AUROC of the best score, adapter there against missing, and the threshold that the hub's own samples give."""
    table = Table(
        "adapter missing; threshold from the hub's samples, for 0.2",
        ("inputs", "method", "AUROC", "let through", "own kept"),
    )
    for label, by_size in seen.items():
        for size, (there, gone) in by_size.items():
            cells = ["", ""]
            if label == "default":
                threshold = default.calibrate(false_accept=0.2, inputs_per_query=size).threshold
                cells = [f"{np.mean(np.concatenate(part) >= threshold):.3f}" for part in (gone, there)]
            rng = np.random.default_rng(seed)
            draws = [rng.integers(len(there), size=len(there)) for _ in range(NUM_DRAWS)]
            low, high = np.quantile([_auroc(there, gone, draw) for draw in draws], (0.025, 0.975))
            table.add(str(size), label, f"{_auroc(there, gone, range(len(there))):.3f} ({low:.3f}-{high:.3f})", *cells)
    default.abstention = None
    return table


def _auroc(there: list[list[float]], gone: list[list[float]], tasks: Sequence[int] | np.ndarray) -> float:
    """How often a query whose adapter is there scores above one whose adapter is missing; ties count half."""
    own_N, foreign_M = (np.concatenate([part[task] for task in tasks]) for part in (there, gone))
    ranked_M = np.sort(foreign_M)
    below_N = np.searchsorted(ranked_M, own_N, "left") + np.searchsorted(ranked_M, own_N, "right")
    return float(below_N.mean() / 2 / len(foreign_M))


def _sureness(tasks: Sequence[PoolTask], default: lw.Retriever) -> Table:
    """How probable the classifier holds its first adapter, and how often that is right."""
    table = Table("probabilities, one input", ("first holds", "queries", "mean probability", "right"))
    found = [(task.name, next(iter(default.probabilities([text]).items()))) for task in tasks for text, _ in task.queries]
    sure_Q = np.array([probability for _, (_, probability) in found])
    right_Q = np.array([name == first for name, (first, _) in found])
    for low, high in zip((0.0, 0.25, 0.5, 0.75, 0.9), (0.25, 0.5, 0.75, 0.9, 1.01), strict=True):
        within_Q = (sure_Q >= low) & (sure_Q < high)
        if within_Q.any():
            means = (f"{values_Q[within_Q].mean():.3f}" for values_Q in (sure_Q, right_Q))
            table.add(f"{low:.2f} to {min(high, 1):.2f}", str(within_Q.sum()), *means)
    return table


@app.command()
def gains(
    context: typer.Context,
    file: Annotated[Path, typer.Option(help="the JSON file of gains")] = DATA / "gains.json",
    num_items: Annotated[int, typer.Option(help="test rows of each task")] = 16,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure also what the file holds")] = False,
) -> None:
    """Measures the gain of every adapter on every unseen task."""
    run: Run = context.obj
    known = json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.is_file() and not fresh else {}
    # bf16: the adapters stay fp32, and differences between adapters are far above its rounding
    model, tokenizer = lw.load_base(dtype=torch.bfloat16)
    engine = lw.Composer(model, [lw.Adapter.from_pretrained(path) for path in run.adapters()])
    names = list(engine.pool.names)
    for task in track(run.entries("unseen"), "gains", console=console, disable=not console.is_terminal):
        if task not in known:
            rows = [row for row in run.rows(task) if row["split"] == "test"][:num_items]
            known[task] = _task_gains(engine, model, tokenizer, names, rows)
            settings = {"base_model": model.name_or_path, "dtype": "bfloat16", "num_items": num_items}
            file.write_text(json.dumps({**settings, "tasks": known}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{len(known)} tasks x {len(names)} adapters in {file}")


def _task_gains(engine: Any, model: Any, tokenizer: Any, names: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    task = lw.Task([(row["input"], row["target"]) for row in rows], instruction=rows[0]["definition"])
    prompts = [task.prompt(text) for text, _ in task.examples]
    prepared = batch(model, tokenizer, encode(model, tokenizer, prompts, [target for _, target in task.examples]))
    with torch.no_grad():
        base_B = mean_losses(model, prepared).double()
        gains = {}
        for name in names:
            with engine.activate({name: 1.0}):
                gains[name] = round(float((base_B - mean_losses(model, prepared).double()).mean()), 4)
    return {"base_loss": round(float(base_B.mean()), 4), "gains": gains}
