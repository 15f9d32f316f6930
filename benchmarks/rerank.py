"""How well a few examples tell which adapter helps: re-ranking against the measured loss change on held-out rows.

    python benchmarks/rerank.py --out runs/rerank
    python benchmarks/rerank.py --out runs/rerank --report      (tables of what has been measured so far)
    python benchmarks/rerank.py --out runs/rerank --speed       (one backward pass beside a probe for each adapter)

For each unseen task, every adapter of the pool runs alone at weight 1 on held-out rows; the fall of the loss there is the
truth. The rankings see five other rows: first-order loss change and gradient similarity (at the base, at the uniform
mixture), a probe of each adapter (all five rows, one row, the first ten by first order), retrieval, and chance. A task's
figures are kept in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _ratios import Way, compare
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import spearmanr

import loraweave as lw
from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.demo import DemoTask, load_task
from loraweave.routers.mixture import MixtureWeights

ROOT = Path(__file__).resolve().parents[1] / "examples"
KS = (1, 3, 5, 10)
SHORT_LIST = 10
# by what rerank() asks the model
ASKED: dict[str, dict[str, Any]] = {
    "first order at the base": {"by": "first_order", "around": "base"},
    "gradient similarity at the base": {"by": "gradient_similarity", "around": "base"},
    "first order at uniform": {"by": "first_order"},
    "gradient similarity at uniform": {"by": "gradient_similarity"},
    "probe": {"by": "probe"},
}
SHORT = f"first order at uniform, then probe of {SHORT_LIST}"
ONE = "probe of one example"
WAYS = ("chance", "retrieval, inputs", "retrieval, inputs + definition", *ASKED, ONE, SHORT)
console = Console(width=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder with MANIFEST.json and unseen/*.jsonl")
    parser.add_argument("--pool", type=Path, default=ROOT / "pool", help="folder of adapter folders")
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--seed", type=int, default=0, help="which five rows are the examples")
    parser.add_argument("--num-held-out", type=int, default=12, help="test rows of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--speed", action="store_true", help="only compare the time of the ways")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.report:
        with tempfile.TemporaryDirectory() as folder, lw.Hub(folder) as hub:
            for path in sorted(path for path in options.pool.iterdir() if path.is_dir()):
                hub.add(path)
            model, tokenizer = lw.load_base(dtype=torch.float32)
            (speed if options.speed else measure)(options, model, tokenizer, hub)
    if not options.speed:
        report(options.out)


def measure(options: argparse.Namespace, model: Any, tokenizer: Any, hub: lw.Hub) -> None:
    names = _task_names(options)
    options.out.mkdir(parents=True, exist_ok=True)
    retriever = lw.Retriever(hub)
    with Progress() as progress:
        shown = progress.add_task("measuring", total=len(names))
        for name in names:
            progress.update(shown, description=name)
            path = options.out / f"{name}-{options.seed}.json"
            figures = json.loads(path.read_text()) if path.is_file() else {"task": name, "seed": options.seed}
            if not set(WAYS[1:]) <= set(figures.get("scores", ())):
                unseen = load_task(options.data, name, options.seed, options.num_held_out)
                if "gain" not in figures:
                    figures |= _gains(model, tokenizer, hub, unseen)
                figures["scores"] = _scores(model, tokenizer, hub, retriever, unseen)
                temporary = path.with_suffix(f".{os.getpid()}")
                temporary.write_text(json.dumps(figures))
                os.replace(temporary, path)
            progress.advance(shown)


def _gains(model: Any, tokenizer: Any, hub: lw.Hub, unseen: DemoTask) -> dict[str, Any]:
    """The base model's loss on the held-out rows, and its fall with each adapter at weight 1."""
    names = tuple(record.name for record in hub)
    held_out = lw.Task([(text, targets[0]) for text, targets in unseen.test], instruction=unseen.task.instruction)
    loss = ExampleLoss(lw.Composer(model, hub.pool(names)), tokenizer, held_out, l1=0.0)
    mixtures = [MixtureWeights.of(mixture, names) for mixture in ({}, *({name: 1.0} for name in names))]
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
        found[way] = lw.rerank(model, tokenizer, hub, task, bare, **asked)
    found[ONE] = lw.rerank(model, tokenizer, hub, replace(task, examples=task.examples[:1]), bare, by="probe")
    first = found["first order at uniform"]
    # the rest keeps its order below the short list
    found[SHORT] = [*lw.rerank(model, tokenizer, hub, task, first[:SHORT_LIST], by="probe"), *first[SHORT_LIST:]]
    return {way: {c.name: -place for place, c in enumerate(listed)} for way, listed in found.items()}


def report(folder: Path) -> None:
    """Prints a row for each way, and for each task how well each way ranks."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise SystemExit(f"no measurements in {folder}; run without --report")
    table = Table(box=MARKDOWN)
    table.add_column("way")
    for column in ("Spearman", *(f"best in first {k}" for k in KS), "share of the best gain", "worse than the base"):
        table.add_column(column, justify="right")
    for way in WAYS:
        rows = np.array([_row(figures, way) for figures in found])
        low, high = _interval(rows[:, 0])
        cells = [f"{rows[:, 0].mean():.2f} [{low:.2f}, {high:.2f}]", *(f"{value:.2f}" for value in rows[:, 1:].mean(axis=0))]
        table.add_row(way, *cells)
    console.print(f"{len(found)} tasks, {len(found[0]['gain'])} adapters; means over tasks [95 % interval over tasks]:")
    console.print(table)
    each = Table(box=MARKDOWN)
    for column in (
        "task",
        "base loss",
        "best adapter (fall)",
        "first by first order at uniform (fall)",
        "Spearman",
        "of retrieval",
    ):
        each.add_column(column)
    for figures in found:
        gain, first = figures["gain"], max(figures["scores"]["first order at uniform"].items(), key=lambda item: item[1])[0]
        best = max(gain, key=lambda name: gain[name])
        spearman = [f"{_row(figures, way)[0]:.2f}" for way in ("first order at uniform", "retrieval, inputs + definition")]
        cells = (f"{figures['base']:.2f}", f"{best} ({gain[best]:.2f})", f"{first} ({gain[first]:.2f})")
        each.add_row(figures["task"], *cells, *spearman)
    console.print(each)


def _row(figures: Mapping[str, Any], way: str) -> list[float]:
    """Spearman, best within k for each k, share of the best gain that the first brings, whether it is below the base."""
    names = list(figures["gain"])
    gain_E = np.array([figures["gain"][name] for name in names])
    best = int(gain_E.argmax())
    if way == "chance":
        share = float(gain_E.mean() / gain_E[best])
        return [0.0, *(k / len(names) for k in KS), share, float((gain_E < 0).mean())]
    score_E = np.array([figures["scores"][way][name] for name in names])
    order = np.argsort(-score_E, kind="stable")
    place = int(np.flatnonzero(order == best)[0])
    first = gain_E[order[0]]
    return [float(spearmanr(score_E, gain_E)[0]), *(float(place < k) for k in KS), first / gain_E[best], float(first < 0)]


def _interval(values: np.ndarray) -> tuple[float, float]:
    generator = np.random.default_rng(0)
    means = values[generator.integers(0, len(values), size=(2000, len(values)))].mean(axis=1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def speed(options: argparse.Namespace, model: Any, tokenizer: Any, hub: lw.Hub) -> None:
    """Processor time for the whole pool on five examples of one task, in forward passes of the base over them."""
    unseen = load_task(options.data, _task_names(options)[0], options.seed, options.num_held_out)
    task = unseen.task
    found = lw.Retriever(hub).for_task([text for text, _ in task.examples], k=len(hub))
    pool = hub.pool([candidate.name for candidate in found])
    base = lw.Composer(model, pool)
    alone = ExampleLoss(base, tokenizer, task, l1=0.0)
    ways = {"one forward pass of the base": Way(lambda: alone([MixtureWeights.of({}, pool.names)]))}
    for count in (1, len(found)):
        some = found[:count]
        ways[f"first_order, {count} adapters"] = Way(lambda some=some: lw.rerank(model, tokenizer, pool, task, some))
    ways[f"probe, {len(found)} adapters"] = Way(lambda: lw.rerank(model, tokenizer, pool, task, found, by="probe"))
    compare(
        "five examples", ways, rounds=5, seconds=900.0, cpu=True, tables={"times a forward pass": (next(iter(ways)), False)}
    )


def _task_names(options: argparse.Namespace) -> Sequence[str]:
    manifest = json.loads((options.data / "MANIFEST.json").read_text())["groups"]["unseen"]
    names = [entry["task"] for entry in manifest if (options.data / entry["file"]).is_file()]
    return [name for name in names if not options.tasks or name in options.tasks]


if __name__ == "__main__":
    main()
