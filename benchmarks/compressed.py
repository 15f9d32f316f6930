"""What composing loses when the hub keeps its adapters in few bits: the pool as it ships, and ternary at several densities.

    python -m benchmarks compressed
    python -m benchmarks compressed --tasks plural_upper --densities 0.2

Each pool is a hub of its own, stored with stored_as="compeft". Two scales of the ternary values: the one nearest to the
factors ("nearest", scale="least_squares"), and the one at which the update has its norm ("norm"), which ComPEFT's tuned
scale comes near to. compose() searches with the same budget and examples in each; the score is on other items. What a
search finds with few evaluations is partly luck, so a first column has none: the mean loss of six adapters, each on test
items of its own task.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import loraweave as lw
from benchmarks._run import Run, Table, pairs
from loraweave.composer.model.scoring import losses
from loraweave.extensions.methods import compeft
from loraweave.extensions.tour import DemoTask, load_task
from loraweave.hub.base import fast_dtype
from loraweave.lowrank import algebra

OWN = ["antonym", "negation", "passive", "past_tense", "pick_first_5", "plural"]
NUM_OWN = 16

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="unseen tasks")] = "pick_verb_5,negated_passive,plural_upper",
    densities: Annotated[str, typer.Option(help="shares of the entries that stay")] = "0.5,0.2,0.1",
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 50,
    budget: Annotated[int, typer.Option(help="evaluations of each search")] = 40,
    seeds: Annotated[str, typer.Option(help="of the examples and the search; the cells are means")] = "0,1",
) -> None:
    """A row for each way to keep the pool: its bytes, the error, the loss on own tasks, and each task's score and loss."""
    run: Run = context.obj
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    adapters = [lw.Adapter.from_pretrained(path) for path in run.adapters()]
    names = tasks.split(",")
    cells = ("pool", "MB", "cosine", "own tasks: loss", *(f"{task}: score, loss" for task in names), "seconds")
    table = Table(f"composed with pools in few bits, {num_test} test items, budget {budget}, seeds {seeds}", cells)
    for label, kept in pools(adapters, [float(density) for density in densities.split(",")]):
        started, scores = time.perf_counter(), []
        with tempfile.TemporaryDirectory() as folder, lw.Hub(folder) as hub:
            for adapter in kept:
                hub.add(adapter, stored_as="factors" if label == "as shipped" else "compeft", anomalies="off")
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.suffix == ".safetensors")
            for name in names:
                found = [
                    _composed(model, tokenizer, hub, load_task(run.data, name, seed, num_test), budget, seed)
                    for seed in map(int, seeds.split(","))
                ]
                score, loss = (sum(part[field] for part in found) / len(found) for field in ("value", "loss"))
                scores.append(f"{score:.0%}, {loss:.2f}")
            own = own_loss(run, model, tokenizer, kept)
        cosine = sum(map(_cosine, adapters, kept)) / len(kept)
        taken = f"{time.perf_counter() - started:.0f}"
        table.add(label, f"{size / 1e6:.1f}", f"{cosine:.2f}", f"{own:.2f}", *scores, taken)
    run.show(table)


def _composed(model: Any, tokenizer: Any, hub: lw.Hub, unseen: DemoTask, budget: int, seed: int) -> dict[str, float]:
    composed = lw.compose(
        model, tokenizer, hub, unseen.task, method="lorahub", budget=budget, folds=0, seed=seed, progress=False
    )
    return composed.evaluate(unseen.test)


def pools(adapters: list[lw.Adapter], densities: list[float]) -> Iterator[tuple[str, list[lw.Adapter]]]:
    yield "as shipped", adapters
    for density in densities:
        nearest = [compeft(adapter, density=density, scale="least_squares") for adapter in adapters]
        yield f"{density:g}, nearest", nearest
        yield f"{density:g}, norm", [_with_norm(adapter, density) for adapter in adapters]


def own_loss(run: Run, model: Any, tokenizer: Any, adapters: list[lw.Adapter]) -> float:
    """The mean over the adapters of OWN of the loss on their own task's first test items."""
    engine, found = lw.Composer(model, [adapter for adapter in adapters if adapter.name in OWN]), []
    for name in engine.pool.names:
        rows = run.rows(name)
        items = pairs(rows, "test")[:NUM_OWN]
        with engine.activate({name: 1.0}):
            found += losses(model, tokenizer, lw.Task(items, instruction=rows[0]["definition"]), items)
    return sum(found) / len(found)


def _with_norm(adapter: lw.Adapter, density: float) -> lw.Adapter:
    """Ternary, with the Frobenius norm of the update as it was; the scale is in a and in b."""
    ratio = _norm(adapter) / _norm(compeft(adapter, density=density))
    return compeft(adapter, density=density, scale=math.sqrt(ratio))


def _norm(adapter: lw.Adapter) -> float:
    return math.sqrt(sum(algebra.inner(factors, factors) for factors in adapter.layers.values()))


def _cosine(left: lw.Adapter, right: lw.Adapter) -> float:
    inner = sum(algebra.inner(left.layers[layer], right.layers[layer]) for layer in left.layers)
    return inner / (_norm(left) * _norm(right))
