"""Does fine-tuning the sentence encoder on some tasks help to find others? Recall on tasks that it never saw.

    python -m benchmarks --data DATA --out runs/encoder encoder            three splits of the tasks
    python -m benchmarks --data DATA --out runs/choose encoder --choose    inside the training tasks, for settings

DATA holds pool/*.jsonl and MANIFEST.json. Each split trains on about 60 % of the tasks (their training rows) and searches
for the others: keys are the mean of a task's first 20 training inputs, queries its test inputs, alone and in groups of five,
without any description. "own keys" has the keys of the held-out tasks, "all keys" those of every task. --choose does the
same inside the training tasks of each split, so that no setting is chosen on a held-out task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks._run import Run, Table, console, pairs
from loraweave.extensions.retrieval_keys import train_encoder
from loraweave.hub.embedders._embedder import unit
from loraweave.hub.embedders.sentence import Sentence

KS = (1, 3, 5)
INPUTS_PER_KEY = 20
INPUTS_PER_QUERY = 5
NUM_QUERIES = 40
TRAINING_SHARE = 0.6
# {what is searched and how: recall at each of KS}
Recalls = dict[str, list[float]]
Inputs = Mapping[str, Sequence[str]]

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    splits: Annotated[str, typer.Option(help="numbers of the splits")] = "0,1,2",
    choose: Annotated[bool, typer.Option("--choose", help="hold out a part of the training tasks instead")] = False,
    steps: Annotated[int, typer.Option(help="of the training")] = 60,
    inputs_per_task: Annotated[int, typer.Option(help="in each step")] = 4,
    lr: Annotated[float, typer.Option(help="learning rate")] = 2e-5,
    temperature: Annotated[float, typer.Option(help="of the softmax over tasks")] = 0.05,
) -> None:
    """Recall before and after the training."""
    run: Run = context.obj
    rows = {task: run.rows(task) for task in run.entries("pool")}
    train, test = (
        {task: [text for text, _ in pairs(own, part)] for task, own in rows.items()} for part in ("train", "test")
    )
    options = {"steps": steps, "inputs_per_task": inputs_per_task, "lr": lr, "temperature": temperature}
    run.show(_table([_split(run, int(number), train, test, choose, options) for number in splits.split(",")]))


def _split(
    run: Run, number: int, train: Inputs, test: Inputs, choose: bool, options: Mapping[str, Any]
) -> dict[str, Recalls]:
    seen, held_out = _parts(list(train), number)
    known = list(train)
    if choose:
        known = seen
        seen, held_out = _parts(seen, number)
    folder = run.folder() / f"split{number}"
    if not folder.is_dir():
        checkpoint = folder.with_suffix(".checkpoint")
        train_encoder({name: train[name] for name in seen}, folder, seed=number, checkpoint=checkpoint, **options)
    console.print(f"split {number}: trained on {len(seen)} tasks, held out {', '.join(held_out)}")
    return {
        label: _recalls(encoder, train, test, held_out, known)
        for label, encoder in (("before", Sentence()), ("after", Sentence(folder=folder)))
    }


def _parts(names: Sequence[str], number: int) -> tuple[list[str], list[str]]:
    order = np.random.default_rng(number).permutation(len(names))
    count = round(TRAINING_SHARE * len(names))
    return [names[i] for i in sorted(order[:count])], [names[i] for i in sorted(order[count:])]


def _recalls(encoder: Sentence, train: Inputs, test: Inputs, held_out: Sequence[str], known: Sequence[str]) -> Recalls:
    keys = {name: unit(encoder.embed(train[name][:INPUTS_PER_KEY]).astype(np.float64).mean(axis=0)) for name in known}
    queries: dict[str, list[tuple[str, np.ndarray]]] = {"one input": [], "five inputs": []}
    generator = np.random.default_rng(0)
    for name in held_out:
        rows_ND = encoder.embed(test[name][:NUM_QUERIES]).astype(np.float64)
        for row_D in rows_ND:
            queries["one input"].append((name, row_D))
            some = generator.choice(len(rows_ND), size=min(INPUTS_PER_QUERY, len(rows_ND)), replace=False)
            queries["five inputs"].append((name, rows_ND[some].mean(axis=0)))
    found: Recalls = {}
    for where, names in (("own keys", list(held_out)), ("all keys", list(known))):
        keys_ND = np.stack([keys[name] for name in names])
        for kind, asked in queries.items():
            scores_QN = np.stack([query_D for _, query_D in asked]) @ keys_ND.T
            wanted_Q = np.array([names.index(name) for name, _ in asked])
            place_Q = (scores_QN > scores_QN[np.arange(len(asked)), wanted_Q][:, None]).sum(axis=1)
            found[f"{kind}, {where}"] = [float((place_Q < k).mean()) for k in KS]
    return found


def _table(results: Sequence[Mapping[str, Recalls]]) -> Table:
    columns = ("query, searched among", "encoder", *(f"recall@{k}" for k in KS), "recall@1 of each split")
    table = Table("recall on tasks that were not trained on, mean over the splits", columns)
    for kind in results[0]["before"]:
        for label in ("before", "after"):
            rows = np.array([result[label][kind] for result in results])
            each = ", ".join(f"{value:.3f}" for value in rows[:, 0])
            table.add(kind, label, *(f"{value:.3f}" for value in rows.mean(axis=0)), each)
    return table
