"""How well a few examples tell which adapter helps: re-ranking against the measured loss change on held-out rows.

    python -m benchmarks --out runs/rerank rerank rank
    python -m benchmarks --out runs/rerank --report rerank rank      (tables of what has been measured so far)
    python -m benchmarks --cpu rerank speed                          (one backward pass beside a probe for each adapter)

For each unseen task, every adapter of the pool runs alone at weight 1 on held-out rows; the fall of the loss there is the
truth. The rankings see five other rows: the first-order loss change at the uniform mixture, a probe of each adapter (all
five rows, one row, the first ten by first order), retrieval, and chance. A task's figures are kept in --out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from scipy.stats import spearmanr

import loraweave as lw
from benchmarks._data import kept, known
from benchmarks._run import RESAMPLES, Run, Table, interval
from benchmarks._timing import Way, compare
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.extensions.reranking import rerank
from loraweave.extensions.tour import DemoTask, load_task

KS = (1, 3, 5, 10)
SHORT_LIST = 10
# by what rerank() asks the model
ASKED: dict[str, dict[str, Any]] = {
    "first order at uniform": {"by": "first_order"},
    "probe": {"by": "probe"},
}
SHORT = f"first order at uniform, then probe of {SHORT_LIST}"
ONE = "probe of one example"
WAYS = ("chance", "retrieval, inputs", "retrieval, inputs + definition", *ASKED, ONE, SHORT)

app = typer.Typer()


@app.command()
def rank(
    context: typer.Context,
    tasks: Annotated[str | None, typer.Option(help="a,b: only these tasks")] = None,
    num_held_out: Annotated[int, typer.Option(help="test rows of each task")] = 12,
) -> None:
    """Rank correlation with the measured falls of the loss, and what the first of each ranking brings."""
    run: Run = context.obj
    folder = run.folder()
    if not run.report:
        model, tokenizer = lw.load_base(dtype=torch.float32)
        with run.hub() as hub:
            retriever = lw.Retriever(hub)

            def figures(name: str) -> dict[str, Any]:
                unseen = load_task(run.data, name, run.seed, num_held_out)
                scores = _scores(model, tokenizer, hub, retriever, unseen)
                return {"task": name, **_gains(model, tokenizer, hub, unseen), "scores": scores}

            chosen = [name for name in run.entries("unseen") if not tasks or name in tasks.split(",")]
            for name in track(chosen, "ranking"):
                kept(folder / f"{name}-{run.seed}.json", partial(figures, name))
    found = known(folder, "*.json")
    if not found:
        raise SystemExit(f"no measurements in {folder}; run without --report")
    run.show(*_tables(found))


def _gains(model: Any, tokenizer: Any, hub: lw.Hub, unseen: DemoTask) -> dict[str, Any]:
    """The base model's loss on the held-out rows, and its fall with each adapter at weight 1."""
    names = tuple(record.name for record in hub)
    held_out = lw.Task([(text, targets[0]) for text, targets in unseen.test], instruction=unseen.task.instruction)
    loss = ExampleLoss(lw.Composer(model, hub.pool(names)), tokenizer, held_out, l1=0.0)
    mixtures = [lw.MixtureWeights.of(mixture, names) for mixture in ({}, *({name: 1.0} for name in names))]
    base, *losses = loss.scores(mixtures)[0].mean(axis=1).tolist()
    return {"base": base, "gain": {name: base - value for name, value in zip(names, losses, strict=True)}}


def _scores(model: Any, tokenizer: Any, hub: lw.Hub, retriever: lw.Retriever, unseen: DemoTask) -> dict[str, dict[str, int]]:
    """{way: {adapter: minus its place}}: places, since scores of two measures do not compare."""
    task, count = unseen.task, len(hub)
    inputs = [text for text, _ in task.examples]
    bare = retriever.for_task(inputs, k=count)
    found = {
        "retrieval, inputs": bare,
        "retrieval, inputs + definition": retriever.for_task(inputs, description=task.instruction, k=count),
    }
    for way, asked in ASKED.items():
        found[way] = rerank(model, tokenizer, hub, task, bare, **asked)
    found[ONE] = rerank(model, tokenizer, hub, replace(task, examples=task.examples[:1]), bare, by="probe")
    first = found["first order at uniform"]
    # the rest keeps its order below the short list
    found[SHORT] = [*rerank(model, tokenizer, hub, task, first[:SHORT_LIST], by="probe"), *first[SHORT_LIST:]]
    return {way: {c.name: -place for place, c in enumerate(listed)} for way, listed in found.items()}


def _tables(found: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """A row for each way, and for each task how well each way ranks."""
    title = f"{len(found)} tasks, {len(found[0]['gain'])} adapters; means over tasks [95 % interval over tasks]"
    columns = ("way", "Spearman", *(f"best in first {k}" for k in KS), "share of the best gain", "worse than the base")
    table = Table(title, columns)
    for way in WAYS:
        rows = np.array([_row(figures, way) for figures in found])
        chosen = np.random.default_rng(0).integers(0, len(rows), size=(RESAMPLES, len(rows)))
        spearman = interval(np.concatenate([[rows[:, 0].mean()], rows[:, 0][chosen].mean(axis=1)]))
        table.add(way, spearman, *(f"{value:.2f}" for value in rows[:, 1:].mean(axis=0)))
    yield table
    by, retrieved = "first order at uniform", "retrieval, inputs + definition"
    columns = ("task", "base loss", "best adapter (fall)", f"first by {by} (fall)", "Spearman", "of retrieval")
    each = Table("by task", columns)
    for figures in found:
        gain, first = figures["gain"], max(figures["scores"][by].items(), key=lambda item: item[1])[0]
        best = max(gain, key=lambda name: gain[name])
        cells = (f"{figures['base']:.2f}", f"{best} ({gain[best]:.2f})", f"{first} ({gain[first]:.2f})")
        each.add(figures["task"], *cells, *(f"{_row(figures, way)[0]:.2f}" for way in (by, retrieved)))
    yield each


def _row(figures: Mapping[str, Any], way: str) -> list[float]:
    """Spearman, best within k for each k, share of the best gain that the first brings, whether it is below the base."""
    names = list(figures["gain"])
    gain_E = np.array([figures["gain"][name] for name in names])
    best = int(np.argmax(gain_E))
    if way == "chance":
        share = float(gain_E.mean() / gain_E[best])
        return [0.0, *(k / len(names) for k in KS), share, float((gain_E < 0).mean())]
    score_E = np.array([figures["scores"][way][name] for name in names])
    order = np.argsort(-score_E, kind="stable")
    place = int(np.flatnonzero(order == best)[0])
    first = gain_E[order[0]]
    return [float(spearmanr(score_E, gain_E)[0]), *(float(place < k) for k in KS), first / gain_E[best], float(first < 0)]


@app.command()
def speed(context: typer.Context, task: Annotated[str | None, typer.Option(help="by default the first")] = None) -> None:
    """Time for the whole pool on five examples of one task, in forward passes of the base over them."""
    run: Run = context.obj
    model, tokenizer = lw.load_base(dtype=torch.float32)
    asked = load_task(run.data, task or next(iter(run.entries("unseen"))), run.seed, 0).task
    with run.hub() as hub:
        found = lw.Retriever(hub).for_task([text for text, _ in asked.examples], k=len(hub))
        pool = hub.pool([candidate.name for candidate in found])
        alone = ExampleLoss(lw.Composer(model, pool), tokenizer, asked, l1=0.0)
        ways = {"one forward pass of the base": Way(lambda: alone([lw.MixtureWeights.of({}, pool.names)]))}
        for count in (1, len(found)):
            some = found[:count]
            ways[f"first_order, {count} adapters"] = Way(lambda some=some: rerank(model, tokenizer, pool, asked, some))
        ways[f"probe, {len(found)} adapters"] = Way(lambda: rerank(model, tokenizer, pool, asked, found, by="probe"))
        tables = {"times a forward pass": (next(iter(ways)), False)}
        compare(run, "five examples", ways, tables, rounds=5, seconds=900.0)
