"""Composes the pool for tasks that no adapter was trained for, five examples each, and compares the ways to do it.

    python benchmarks/unseen.py --out runs/unseen
    python benchmarks/unseen.py --out runs/unseen --report      (tables of what has been measured so far)

The ways: the base model; the adapter that retrieval puts first; the adapter of the lowest loss on the examples; a uniform
mixture of the k retrieved; the original LoraHub recipe (20 adapters at random, A and B mixed apart, 40 evaluations by
nevergrad's NGOpt, the loss as its authors coded it); and loraweave's `compose(method="auto")`. Every measurement is kept in
--out as it is made, so that an interrupted run goes on, and several processes may share the tasks (--tasks).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import loraweave as lw
from loraweave.composer.batches import IGNORED, batch, encode, token_losses
from loraweave.composer.scoring import bootstrap, evaluate
from loraweave.demo import DemoTask, fast_dtype, load_task

ROOT = Path(__file__).resolve().parents[1] / "examples"
WAYS = ("base", "retrieved_first", "best_single", "uniform", "lorahub_original", "loraweave")
RECIPE_POOL = 20
RECIPE_BOUND = 1.5
RECIPE_BUDGET = 40
RECIPE_L1 = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder with MANIFEST.json and unseen/*.jsonl")
    parser.add_argument("--pool", type=Path, default=ROOT / "pool", help="folder of adapter folders")
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--k", type=int, default=20, help="adapters that retrieval brings")
    parser.add_argument("--budget", type=int, default=40, help="evaluations of each search")
    parser.add_argument("--num-test", type=int, default=100, help="test items of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.report:
        measure(options)
    report(options)


def measure(options: argparse.Namespace) -> None:
    manifest = json.loads((options.data / "MANIFEST.json").read_text())["groups"]["unseen"]
    names = [entry["task"] for entry in manifest if (options.data / entry["file"]).is_file()]
    names = [name for name in names if not options.tasks or name in options.tasks]
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, lw.Hub(folder) as hub, Progress() as progress:
        for path in sorted(path for path in options.pool.iterdir() if path.is_dir()):
            hub.add(path)
        shown = progress.add_task("measuring", total=len(names) * len(options.seeds))
        for seed in options.seeds:
            for name in names:
                progress.update(shown, description=f"{name}, seed {seed}")
                bench = _Bench(model, tokenizer, hub, load_task(options.data, name, seed, options.num_test), seed, options)
                bench.run()
                progress.advance(shown)


class _Bench:
    """One task with one seed."""

    def __init__(
        self, model: Any, tokenizer: Any, hub: lw.Hub, unseen: DemoTask, seed: int, options: argparse.Namespace
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.hub = hub
        self.unseen = unseen
        self.seed = seed
        self.options = options

    def run(self) -> None:
        if not self._known("base", 0):
            self._keep("base", 0, {}, "linear", 0.0, {})
        if not self._known("loraweave"):
            self._composed()
        if not self._known("lorahub_original"):
            started = time.perf_counter()
            weights = self._original_recipe()
            self._keep("lorahub_original", self.seed, weights, "factor_sum", time.perf_counter() - started, {})

    def _composed(self) -> None:
        """compose() measures the best single adapter and the uniform mixture on its way."""
        composition = lw.compose(
            self.model,
            self.tokenizer,
            self.hub,
            self.unseen.task,
            method="auto",
            k=self.options.k,
            budget=self.options.budget,
            seed=self.seed,
            progress=False,
        )
        report = composition.report
        first = report.candidates[0][0]
        self._keep("retrieved_first", self.seed, {first: 1.0}, "linear", 0.0, {"candidates": report.candidates})
        for name in ("best_single", "uniform"):
            self._keep(name, self.seed, dict(report[name].weights), "linear", report[name].seconds, {})
        extra = {"chosen": report.chosen, "lorahub": dict(report["lorahub"].weights), "rows": report.to_json()["rows"]}
        self._keep("loraweave", self.seed, composition.weights, composition.merge_method, report.seconds, extra)

    def _original_recipe(self) -> dict[str, float]:
        import nevergrad

        names = random.Random(self.seed).sample([record.name for record in self.hub], RECIPE_POOL)
        engine = lw.Composer(self.model, self.hub.pool(names))
        task = self.unseen.task
        prompts, targets = [task.prompt(text) for text, _ in task.examples], [target for _, target in task.examples]
        prepared = batch(self.model, self.tokenizer, encode(self.model, self.tokenizer, prompts, targets))
        num_tokens = int((prepared.targets_BK != IGNORED).sum())

        @torch.no_grad()
        def objective(values: np.ndarray) -> float:
            weights = {name: float(value) for name, value in zip(names, values, strict=True) if value}
            with _mixed(engine, weights, "factor_sum"):
                # the mean token loss of the one batch, divided by the number of examples once more, as published
                loss = float(token_losses(self.model, prepared).sum()) / num_tokens / len(task.examples)
            return loss + RECIPE_L1 * float(np.abs(values).mean())

        space = nevergrad.p.Array(init=np.zeros(len(names)), lower=-RECIPE_BOUND, upper=RECIPE_BOUND)
        space.random_state = np.random.RandomState(self.seed)
        optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=RECIPE_BUDGET)
        best = optimizer.minimize(objective).value
        engine.close()
        return {name: float(value) for name, value in zip(names, best, strict=True)}

    def _keep(
        self, way: str, seed: int, weights: Mapping[str, float], method: str, seconds: float, extra: dict[str, Any]
    ) -> None:
        weights = {name: float(weight) for name, weight in weights.items() if weight}
        started = time.perf_counter()
        engine = lw.Composer(self.model, self.hub.pool(list(weights))) if weights else None
        with _mixed(engine, weights, method):
            score = evaluate(self.model, self.tokenizer, self.unseen.task, self.unseen.test)
        figures = {
            "task": self.unseen.name,
            "way": way,
            "seed": seed,
            "value": score.value,
            "loss": score.loss,
            "right": [int(item) for item in score.right],
            "weights": weights,
            "seconds": seconds,
            "answer_seconds": time.perf_counter() - started,
            **extra,
        }
        path = self._path(way, seed)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(figures))
        os.replace(temporary, path)

    def _known(self, way: str, seed: int | None = None) -> bool:
        return self._path(way, self.seed if seed is None else seed).is_file()

    def _path(self, way: str, seed: int) -> Path:
        return Path(self.options.out) / f"{self.unseen.name}-{way}-{seed}.json"


@contextmanager
def _mixed(engine: lw.Composer | None, weights: Mapping[str, float], method: str) -> Iterator[None]:
    """The model with a mixture, live for sums of deltas and written in for the factor methods."""
    if engine is None or not weights:
        yield
        return
    with engine.activate(weights) if method == "linear" else engine.fused(weights, method=method):
        yield


def report(options: argparse.Namespace) -> None:
    """Prints one row a task and the means; intervals by bootstrap over test items, seeds averaged per item."""
    manifest = json.loads((options.data / "MANIFEST.json").read_text())["groups"]["unseen"]
    relations = {entry["task"]: entry["relation"] for entry in manifest}
    found = [json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))]
    tasks = [name for name in relations if any(row["task"] == name for row in found)]
    table = Table(box=MARKDOWN)
    for column in ("task", "relation", *WAYS, "chosen"):
        table.add_column(column, no_wrap=True)
    items: dict[str, dict[str, np.ndarray]] = {way: {} for way in WAYS}
    for name in tasks:
        cells = []
        for way in WAYS:
            rows = [row for row in found if row["task"] == name and row["way"] == way]
            if rows:
                items[way][name] = np.mean([row["right"] for row in rows], axis=0)
                low, high = bootstrap(items[way][name])
                cells.append(f"{items[way][name].mean():.2f} [{low:.2f}, {high:.2f}]")
            else:
                cells.append("-")
        chosen = Counter(row["chosen"] for row in found if row["task"] == name and row["way"] == "loraweave")
        table.add_row(name, relations[name], *cells, ", ".join(f"{way} {count}" for way, count in chosen.most_common()))
    for label, group in _groups(tasks, relations):
        table.add_row(label, "", *(_mean_cell(items[way], group) for way in WAYS), "")
    print("Right answers on test items, mean over seeds [95 % interval over items]:")
    Console(width=300).print(table)
    _losses(found, tasks)


def _groups(tasks: Sequence[str], relations: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    for relation in dict.fromkeys(relations[name] for name in tasks):
        yield f"mean of {relation}", [name for name in tasks if relations[name] == relation]
    yield "mean of all", list(tasks)


def _mean_cell(values: Mapping[str, np.ndarray], group: Sequence[str]) -> str:
    known = [values[name] for name in group if name in values]
    if len(known) < len(group) or not known:
        return "-"
    generator = np.random.default_rng(0)
    means = [np.mean([v[generator.integers(0, len(v), len(v))].mean() for v in known]) for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{np.mean([v.mean() for v in known]):.3f} [{low:.3f}, {high:.3f}]"


def _losses(found: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> None:
    table = Table(box=MARKDOWN)
    for column in ("way", "loss", "seconds", "measured"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in WAYS:
        rows = [row for row in found if row["way"] == way and row["task"] in tasks]
        if rows:
            loss, seconds = (float(np.mean([row[key] for row in rows])) for key in ("loss", "seconds"))
            table.add_row(way, f"{loss:.3f}", f"{seconds:.1f}", str(len(rows)))
    print("Mean test loss, and seconds to choose the weights:")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
