"""Every call that spreads, on workers of which one is killed every few seconds, beside the same call in one process.

    python -m benchmarks spread_calls [--backends loky,dask,ray --every 45]

The base is a random Llama of two blocks over characters, the adapters are random: only whether results are equal is told.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import loraweave as lw
from benchmarks._models import random_adapter
from benchmarks._run import Run, Table, console
from benchmarks.spread import WORKERS, Backends, Counting, killing, tiny_base, workers
from loraweave.extensions.reranking import rerank
from loraweave.extensions.sources import add_tree
from loraweave.extensions.statistics import pool_statistics

app = typer.Typer()

ADAPTERS = 96
INPUTS = 64
# what a call comes to, as text that is equal where every bit is
Call = Callable[[], str]


@app.command()
def spread_calls(
    context: typer.Context,
    backends: Backends = "loky,dask,ray",
    every: Annotated[float, typer.Option(help="seconds between two kills")] = 45.0,
    rounds: Annotated[int, typer.Option(min=1, help="how often each call is made")] = 2,
    count: Annotated[int, typer.Option("--workers", min=2)] = WORKERS,
) -> None:
    """Intake, re-ranking, statistics and searches: what differs from one process."""
    run: Run = context.obj
    columns = ("backend", "call", "workers killed", "pieces handed out again", "equal to one process", "s")
    table = Table(f"each call {rounds} times on {count} workers, one killed every {every:g} s", columns)
    with tempfile.TemporaryDirectory() as place, _calls(Path(place), run.seed) as calls:
        known = {name: call() for name, call in calls.items()}
        for backend in backends.split(","):
            with workers(backend, count), killing(backend, every, run.seed) as killed:
                for name, call in calls.items():
                    started, before, lost = time.perf_counter(), len(killed), Counting()
                    with lost:
                        equal = sum(call() == known[name] for _ in range(rounds))
                    spent = time.perf_counter() - started
                    counts = map(str, (len(killed) - before, lost.count))
                    table.add(backend, name, *counts, f"{equal} of {rounds}", f"{spent:.0f}")
                    console.print(" ".join(table.rows[-1]))
    run.show(table)


@contextmanager
def _calls(folder: Path, seed: int) -> Iterator[dict[str, Call]]:
    model, tokenizer = tiny_base(folder / "base")
    names = [f"adapter-{number}" for number in range(ADAPTERS)]
    for number, name in enumerate(names):
        random_adapter(model, name, "qv", seed + number, rank=4).save_pretrained(folder / "pool" / name)
    texts = random.Random(seed)
    inputs = ["".join(texts.choices("abcdefgh", k=6)) for _ in range(INPUTS)]
    task = lw.Task([(text, text[::-1]) for text in inputs[:48]], instruction="Reverse the letters.")
    few = lw.Task(task.examples[:6], instruction=task.instruction)
    quiet: dict[str, Any] = {"progress": False}
    with lw.Hub(folder / "hub") as hub:
        hub.add_many([folder / "pool" / name for name in names], **quiet)

        def added(tree: bool) -> str:
            with tempfile.TemporaryDirectory() as own, lw.Hub(own) as new:
                sources = [folder / "pool" / name for name in names]
                add_tree(new, folder / "pool", **quiet) if tree else new.add_many(sources, **quiet)
                assert not new.verify().problems
                return str(sorted((record.name.split("/")[-1], record.hash) for record in new))

        def ranked() -> str:
            candidates = [lw.Candidate(name, 0.0, "", hub.record(name)) for name in names]
            found = rerank(model, tokenizer, hub, few, candidates, by="probe", **quiet)
            return str([(each.name, each.score) for each in found])

        def statistics() -> str:
            found = pool_statistics(model, tokenizer, hub, dict.fromkeys(names[:8], inputs[:32]), **quiet)
            digest = hashlib.sha256()
            for each in found.values():
                for seen in each.layers.values():
                    for part in (seen.gram_II, seen.fisher_OI):
                        assert part is not None
                        digest.update(part.numpy().tobytes())
            return digest.hexdigest()

        def composed(**asked: Any) -> str:
            found = lw.compose(model, tokenizer, hub.pool(names[:12]), task, seed=seed, folds=3, **quiet, **asked)
            return str([(row.name, row.loss, row.held_out_loss, row.losses, row.weights) for row in found.report.rows])

        yield {
            "pool_statistics": statistics,
            "compose, lorahub": lambda: composed(method="lorahub", budget=27),
            "compose, gradient": lambda: composed(method="gradient", budget=8),
            "compose, ties by lorahub": lambda: composed(method="lorahub", budget=14, merge_method="ties"),
            "hub.add_many": lambda: added(False),
            "add_tree": lambda: added(True),
            "rerank": ranked,
        }
