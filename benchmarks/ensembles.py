"""Ensembles in prediction space beside their members and the uniform mixture of them, on tasks whose answers are labels.

    python benchmarks/ensembles.py --out runs/ensembles --data DATA
    python benchmarks/ensembles.py --out runs/ensembles --report      (tables of what has been measured so far)

"retrieved": for each unseen task with labels, the three adapters that retrieval puts first for five examples and the
description, in fp32. "seeds": adapters trained on one task from three starts, each with data in an order of its own, like
the pool's (rank 8 on q_proj and v_proj, bf16 base) but for 40 steps. What was measured is kept in --out, so that an
interrupted run goes on.

Every way gives a distribution over the labels (the softmax of their summed log-likelihoods); reported are the share of right
answers, the mean negative log-likelihood of the target label in nats, and the expected calibration error in 10 bins of
equal width (Guo et al., 2017), with 95 % bootstrap intervals over test items.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

import loraweave as lw
from loraweave.composer.scoring import padded
from loraweave.demo import load_task, read_rows

ROOT = Path(__file__).resolve().parents[1] / "examples"
NUM_RETRIEVED = 3
NUM_SEEDS = 3
SEED_STEPS = 40
SEED_TASKS = ("question_type", "intent_domain")
ROWS_PER_CALL = 25
NUM_BINS = 10
RESAMPLES = 1000

# (log_NL, targets_N) -> figure; the number of items -> which of them
Metric = Callable[[np.ndarray, np.ndarray], float]
Draw = Callable[[int], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder with MANIFEST.json, pool and unseen")
    parser.add_argument("--pool", type=Path, default=ROOT / "pool", help="folder of adapter folders")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        retrieved(options)
        seeds(options)
    for kind in ("retrieved", "seeds"):
        if found := [json.loads(path.read_text()) for path in sorted(options.out.glob(f"{kind}-*.json"))]:
            report(kind, found)


def retrieved(options: argparse.Namespace) -> None:
    model, tokenizer = lw.load_base()
    entries = [
        entry for entry in _entries(options.data, "unseen") if not _path(options, "retrieved", entry["task"]).exists()
    ]
    with tempfile.TemporaryDirectory() as folder, lw.Hub(folder) as hub:
        for path in sorted(path for path in options.pool.iterdir() if path.is_dir()):
            hub.add(path)
        retriever = lw.Retriever(hub)
        for entry in track(entries, "retrieved"):
            unseen = load_task(options.data, entry["task"], 0, 100)
            inputs = [text for text, _ in unseen.task.examples]
            hits = retriever.for_task(inputs, description=unseen.task.instruction, k=NUM_RETRIEVED)
            engine = lw.Composer(model, hub.pool([hit.name for hit in hits]), tokenizer=tokenizer)
            measure(
                engine, unseen.task, [(text, targets[0]) for text, targets in unseen.test], options, "retrieved", unseen.name
            )
            engine.close()


def seeds(options: argparse.Namespace) -> None:
    model, tokenizer = lw.load_base(dtype=torch.bfloat16)
    for entry in _entries(options.data, "pool"):
        if entry["task"] not in SEED_TASKS or _path(options, "seeds", entry["task"]).exists():
            continue
        rows = read_rows(options.data / entry["file"])
        pairs = {split: [(r["input"], r["target"]) for r in rows if r["split"] == split] for split in ("train", "test")}
        task = lw.Task(pairs["train"], instruction=entry["definition"], labels=entry["labels"])
        # a job draws its start and the order of its rows by its name
        jobs = {f"start {number}": task for number in range(NUM_SEEDS)}
        adapters = lw.train_adapters(
            model, tokenizer, jobs, steps=SEED_STEPS, jobs_per_batch=NUM_SEEDS, checkpoint=options.out / "training"
        )
        engine = lw.Composer(model, list(adapters.values()), tokenizer=tokenizer)
        measure(engine, task, pairs["test"], options, "seeds", entry["task"])
        engine.close()


def measure(
    engine: lw.Composer,
    task: lw.Task,
    test: Sequence[tuple[str, str]],
    options: argparse.Namespace,
    kind: str,
    name: str,
) -> None:
    """Keeps each way's log-probabilities of the labels for every test item."""
    members = [{expert: 1.0} for expert in engine.pool.names]
    uniform = dict.fromkeys(engine.pool.names, 1 / len(members))
    parts, averages = [], []
    for start in range(0, len(test), ROWS_PER_CALL):
        texts = [task.prompt(text) for text, _ in test[start : start + ROWS_PER_CALL]]
        batch = padded(engine.model, engine.tokenizer, texts)
        # the base and the mixture ride along without a say
        shares = [1.0] * len(members) + [0.0, 0.0]
        found = lw.ensemble(engine, [*members, uniform, None], batch, labels=task.labels, weights=shares)
        parts.append(found.members_MBV)
        averages.append(found.log_probabilities)
    ways = dict(zip([*engine.pool.names, "uniform mixture", "base"], torch.cat(parts, dim=1).tolist(), strict=True))
    ways["ensemble"] = torch.cat(averages).tolist()
    targets = [list(task.labels or ()).index(target) for _, target in test]
    figures = {"task": name, "members": list(engine.pool.names), "targets": targets, "ways": ways}
    _path(options, kind, name).write_text(json.dumps(figures))


def report(kind: str, found: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=MARKDOWN)
    for column in ("task", "way", "right", "NLL", "ECE"):
        table.add_column(column, no_wrap=True)
    for row in found:
        for way in ("base", *row["members"], "uniform mixture", "ensemble"):
            cells = (_interval(lambda draw, row=row, way=way, metric=m: _mean([row], way, metric, draw)) for m in METRICS)
            table.add_row(row["task"], way, *cells)
    print(f"{kind}: right answers, loss of the target label in nats, calibration error [95 % interval over items]")
    Console(width=160).print(table)
    _means(found)


def _means(found: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=MARKDOWN)
    for column in ("mean over tasks", "right", "NLL", "ECE"):
        table.add_column(column, no_wrap=True)
    for way in ("base", "mean of members", "uniform mixture", "ensemble"):
        table.add_row(way, *(_interval(lambda draw, way=way, metric=m: _mean(found, way, metric, draw)) for m in METRICS))
    Console(width=120).print(table)


def _mean(found: Sequence[Mapping[str, Any]], way: str, metric: Metric, draw: Draw) -> float:
    """The mean over tasks; "mean of members" is the mean of each one's own figure."""
    values = []
    for row in found:
        targets_N = np.array(row["targets"])
        chosen = draw(len(targets_N))
        names = row["members"] if way == "mean of members" else [way]
        values.append(np.mean([metric(np.array(row["ways"][name])[chosen], targets_N[chosen]) for name in names]))
    return float(np.mean(values))


def right(log_NL: np.ndarray, targets_N: np.ndarray) -> float:
    return float((log_NL.argmax(axis=1) == targets_N).mean())


def loss(log_NL: np.ndarray, targets_N: np.ndarray) -> float:
    return float(-log_NL[np.arange(len(targets_N)), targets_N].mean())


def calibration_error(log_NL: np.ndarray, targets_N: np.ndarray) -> float:
    """The sum over bins of their share of items times |share of right answers - mean confidence|."""
    confidence_N = np.exp(log_NL.max(axis=1))
    right_N = log_NL.argmax(axis=1) == targets_N
    bin_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs((right_N[bin_N == b] - confidence_N[bin_N == b]).sum()) for b in range(NUM_BINS)]
    return float(sum(gaps) / len(targets_N))


METRICS: tuple[Metric, ...] = (right, loss, calibration_error)


def _interval(figure: Callable[[Draw], float]) -> str:
    """A figure of all items, and the 2.5 and 97.5 percentiles of it over resamples of the items."""
    generator = np.random.default_rng(0)
    resampled = [figure(lambda size: generator.integers(0, size, size)) for _ in range(RESAMPLES)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return f"{figure(np.arange):.2f} [{low:.2f}, {high:.2f}]"


def _path(options: argparse.Namespace, kind: str, name: str) -> Path:
    return Path(options.out) / f"{kind}-{name}.json"


def _entries(data: Path, group: str) -> list[dict[str, Any]]:
    """The manifest's tasks with labels whose rows are there."""
    manifest = json.loads((data / "MANIFEST.json").read_text())["groups"][group]
    return [entry for entry in manifest if entry["labels"] and (data / entry["file"]).is_file()]


if __name__ == "__main__":
    main()
