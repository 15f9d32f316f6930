"""Adapters made from a task's description and five examples, for tasks that the hypernetwork was not trained on.

    python -m benchmarks --out runs/hypernetwork hypernetwork
    python -m benchmarks --out runs/hypernetwork hypernetwork --parts 0,1,2,3,4 --ways factors

The pool's tasks are dealt into five parts. A part's tasks are answered by the base, by each task's own adapter, by the equal
mixture of the other parts' adapters, by the one of them that retrieval finds first for the same description and examples,
and by what a hypernetwork makes that was trained on the other parts: on their factors, or on answers to their cards'
examples; also by what it makes when it is told of another task. Finished networks and answers are kept in --out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import loraweave as lw
from benchmarks._data import kept
from benchmarks._run import Run, Table, interval, pairs
from loraweave.composer.model.scoring import losses
from loraweave.hub.base import fast_dtype

NUM_PARTS = 5
NUM_SHOWN = 5

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    parts: Annotated[str, typer.Option(help="which of the five are left out in turn")] = "0",
    ways: Annotated[str, typer.Option(help="of training: factors, answers")] = "factors,answers",
    steps: Annotated[str, typer.Option(help="of each way")] = "600,60",
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 10,
) -> None:
    """A row for each way to answer, over the tasks that were left out."""
    run: Run = context.obj
    torch.manual_seed(run.seed)
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    numbers = dict(zip(ways.split(","), map(int, steps.split(",")), strict=True))
    found: dict[str, list[float]] = {}
    for part in map(int, parts.split(",")):
        for way, answers in _part(run, model, tokenizer, part, numbers, num_test).items():
            found.setdefault(way, []).extend(answers)
    title = f"{num_test} test items of each of {len(found['base'])} tasks, told by a description and {NUM_SHOWN} examples"
    table = Table(title, ("answered by", "loss, mean over tasks"))
    for way, values in found.items():
        table.add(way, _mean(values, run.seed))
    run.show(table)


def _part(run: Run, model: Any, tokenizer: Any, part: int, numbers: dict[str, int], num_test: int) -> dict[str, list[float]]:
    """{way: the loss of each task that is left out}."""
    folder = run.folder()
    with run.hub() as hub:
        left = sorted(run.entries("pool"))[part::NUM_PARTS]
        others = sorted(record.name for record in hub.records() if record.name not in left)
        made: dict[str, dict[str, lw.Adapter]] = {"its own adapter": {name: hub[name] for name in left}}
        said = {name: _said(run, name) for name in left}
        for way, count in numbers.items():
            path = folder / f"{way}{count}.{part}"
            network = _network(hub, model, tokenizer, path, others, way, count, run.seed)
            made[f"made, from {way}"] = {name: network.adapter(name=name, **said[name]) for name in left}
            # if this is as good, the network reads nothing in the text
            wrong = dict(zip(left, [*left[1:], left[0]], strict=True))
            made[f"told of another task, from {way}"] = {n: network.adapter(name=n, **said[wrong[n]]) for n in left}
        for name in left:
            hub.remove(name)
        finder = lw.Retriever(hub)
        first = {
            name: finder.for_examples(each["examples"], description=each["description"], k=1)[0].record.name
            for name, each in said.items()
        }
        pool = {name: hub[name] for name in others}
        shares = dict.fromkeys(others, 1 / len(others))
        mixtures: dict[str, dict[str, tuple[dict[str, lw.Adapter], dict[str, float]]]] = {
            "base": {name: ({}, {}) for name in left},
            "equal mixture": dict.fromkeys(left, (pool, shares)),
            "found first": {name: ({first[name]: pool[first[name]]}, {first[name]: 1.0}) for name in left},
        }
        for way, adapters in made.items():
            mixtures[way] = {name: ({name: adapter}, {name: 1.0}) for name, adapter in adapters.items()}

        def asked(way: str, name: str) -> float:
            rows = run.rows(name)
            items = pairs(rows, "test")[:num_test]
            task = lw.Task(items, instruction=rows[0]["definition"])
            adapters, weights = mixtures[way][name]
            if not adapters:
                return float(np.mean(losses(model, tokenizer, task, items)))
            with lw.Composer(model, adapters).activate(weights):
                return float(np.mean(losses(model, tokenizer, task, items)))

        return {
            way: [
                kept(
                    folder / f"{way}.{numbers.get(way.rpartition(' ')[2], '')}.{name}.json",
                    lambda w=way, n=name: asked(w, n),
                )
                for name in left
            ]
            for way in mixtures
        }


def _network(
    hub: lw.Hub, model: Any, tokenizer: Any, path: Path, names: list[str], way: str, steps: int, seed: int
) -> lw.Hypernetwork:
    if not path.is_dir():
        on: tuple[Any, ...] = (hub,) if way == "factors" else (hub, model, tokenizer)
        options: dict[str, Any] = {"tasks_per_step": 4, "rows_per_task": 2, "lr": 3e-3, "seed": seed}
        lw.train_hypernetwork(*on, names=names, steps=steps, **options).save_pretrained(path)
    return lw.Hypernetwork.from_pretrained(path)


def _said(run: Run, name: str) -> dict[str, Any]:
    rows = run.rows(name)
    return {"description": rows[0]["definition"], "examples": pairs(rows, "train")[:NUM_SHOWN]}


def _mean(values: list[float], seed: int) -> str:
    draws = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    each = np.array(values)
    return interval(np.concatenate([[each.mean()], each[draws].mean(axis=1)]))
