"""Three tasks learned one after the other, and what is left of the first two: every way of `train_in_order`.

    python -m benchmarks --out runs/continual continual
    python -m benchmarks --out runs/continual continual --ways 'sequential;ilora' --steps 60

Each way sees the same rows at the same rates. After the last task its last adapter is scored on test items of all three;
"just learned" is a task's loss with the adapter that it left. Then what I-LoRA's course ended with, which knows them all, is
made to forget the last task, with GS-LoRA and by plain ascent, and scored again. Finished tasks are kept in --out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import numpy as np
import typer

import loraweave as lw
from benchmarks._run import Run, Table, pairs
from loraweave.composer.model.scoring import evaluate, losses
from loraweave.extensions.continual import train_in_order
from loraweave.hub.base import fast_dtype

WAYS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "sequential": ("sequential", {}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.5}),
    "task_arithmetic, tuned": ("task_arithmetic", {"weight": 0.5, "exemplars": 8, "tuning_steps": 10}),
    "ilora": ("ilora", {}),
    "ilora, slow": ("ilora", {"decay": 0.95}),
    "construct_vl": ("construct_vl", {"replay": 0.0}),
    "inflora": ("inflora", {}),
}
FORGETTING: dict[str, Mapping[str, Any]] = {
    "gs_lora": {"strength": 0.3, "sparsity": 0.6, "dense_steps": 5},
    "gs_lora without sparsity": {"strength": 0.3, "sparsity": 0.0},
    # what is retained counts for nothing beside it, and no bound ends it
    "plain ascent": {"strength": 100.0, "sparsity": 0.0, "bound": 1e6},
}


app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="in the order of learning")] = "past_tense,negation,passive",
    ways: Annotated[str, typer.Option(help="rows of the first table")] = ";".join(WAYS),
    steps: Annotated[int, typer.Option(help="of each task")] = 40,
    batch_size: Annotated[int, typer.Option(help="rows of a step")] = 4,
    rank: Annotated[int, typer.Option(help="of each adapter")] = 8,
    lr: Annotated[float, typer.Option(help="highest learning rate")] = 3e-3,
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 40,
) -> None:
    """What is known after the last task, and what is after one was forgotten."""
    run: Run = context.obj
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    names, learned, tests = tasks.split(","), {}, {}
    for name in names:
        rows = run.rows(name)
        learned[name] = lw.Task(pairs(rows, "train"), instruction=rows[0]["definition"])
        tests[name] = pairs(rows, "test")[:num_test]
    settings = {"steps": steps, "batch_size": batch_size, "rank": rank, "lr": lr, "seed": run.seed, "progress": False}
    bench = _Bench(model, tokenizer, learned, tests, {**settings, "checkpoint": run.folder()})
    scores = tuple(f"{name}: right, loss" for name in names)
    table = Table("after the last task", ("way", *scores, "earlier tasks: just learned, now", "seconds"))
    table.add(*bench.row("base model", {}, ""))
    for label in ways.split(";"):
        way, options = WAYS[label]
        started = time.perf_counter()
        adapters = train_in_order(model, tokenizer, learned, way=way, options=options, **bench.settings)
        table.add(*bench.row(label, adapters, f"{time.perf_counter() - started:.0f}"))
    run.show(table)
    before = train_in_order(model, tokenizer, learned, way="ilora", **bench.settings)
    run.show(bench.forget(before[names[-1]], names))


class _Bench:
    """The model, the tasks, and how adapters are scored."""

    def __init__(self, model: Any, tokenizer: Any, learned: Any, tests: Any, settings: Mapping[str, Any]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.learned = learned
        self.tests = tests
        self.settings = settings

    def row(self, label: str, adapters: Mapping[str, lw.Adapter], seconds: str) -> tuple[str, ...]:
        last = list(adapters.values())[-1] if adapters else None
        scores = {name: self._score(last, name) for name in self.learned}
        cells = [f"{score.value:.0%}, {score.loss:.2f}" for score in scores.values()]
        earlier = list(adapters)[:-1]
        kept = ""
        if earlier:
            then = np.mean([self._loss(adapters[name], name) for name in earlier])
            kept = f"{then:.2f}, {np.mean([scores[name].loss for name in earlier]):.2f}"
        return label, *cells, kept, seconds

    def forget(self, before: lw.Adapter, names: list[str]) -> Table:
        """The second table: the last task is to be forgotten, the first half of the others' examples retained."""
        forgotten, others = names[-1], names[:-1]
        retain = [(task.prompt(text), y) for task in map(self.learned.get, others) for text, y in task.examples[:16]]
        columns = (f"after forgetting {forgotten}", *(f"{name}: right, loss" for name in names), "blocks of zeros")
        table = Table(f"made to forget {forgotten}", columns)
        table.add(*self._forgotten("before", before, names, ""))
        for label, options in FORGETTING.items():
            found = train_in_order(
                self.model,
                self.tokenizer,
                {forgotten: self.learned[forgotten]},
                start={forgotten: before},
                way="gs_lora",
                options={"retain": lw.Task(retain, template="{input}"), **options},
                target_modules=("up_proj", "down_proj"),
                **self.settings,
            )[forgotten]
            blocks: dict[str, bool] = {}
            for layer, factors in found.layers.items():
                if ".mlp." in layer:
                    block = layer.split(".mlp.")[0]
                    blocks[block] = blocks.get(block, True) and not bool(factors.b_OR.any())
            table.add(*self._forgotten(label, found, names, f"{sum(blocks.values())} of {len(blocks)}"))
        return table

    def _forgotten(self, label: str, adapter: lw.Adapter, names: list[str], zeros: str) -> tuple[str, ...]:
        scores = [self._score(adapter, name) for name in names]
        return label, *(f"{score.value:.0%}, {score.loss:.2f}" for score in scores), zeros

    def _score(self, adapter: lw.Adapter | None, name: str) -> Any:
        with self._with(adapter):
            return evaluate(self.model, self.tokenizer, self.learned[name], self.tests[name])

    def _loss(self, adapter: lw.Adapter, name: str) -> float:
        with self._with(adapter):
            return float(np.mean(losses(self.model, self.tokenizer, self.learned[name], self.tests[name])))

    def _with(self, adapter: lw.Adapter | None) -> AbstractContextManager[Any]:
        return nullcontext() if adapter is None else lw.Composer(self.model, {"it": adapter}).activate({"it": 1.0})
