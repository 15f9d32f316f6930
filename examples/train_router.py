"""Trains a router over the shipped pool on rows of all its tasks mixed, and compares it on rows held out.

    python examples/train_router.py --router mole --out routed

Prints the mean loss per target token of the base, of all adapters alike, of each task's own adapter (which the router is not
told), and of the router; writes the router with its curves. Twice with the same --checkpoint, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

import loraweave as lw
from loraweave.composer.model.scoring import losses
from loraweave.extensions.explain import plot_training

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", default="mole")
    parser.add_argument("--tasks", nargs="*", help="the pool's tasks, all by default")
    parser.add_argument("--rows", type=int, default=100, help="of each task, to train on")
    parser.add_argument("--held-out", type=int, default=8, help="of each task, to compare on")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)
    model, tokenizer = lw.load_base()
    data, held = {}, {}
    for path in sorted((HERE / "data" / "pool").glob("*.jsonl")):
        if not asked.tasks or path.stem in asked.tasks:
            data[path.stem] = task_of(path, "train", asked.rows)
            held[path.stem] = task_of(path, "test", asked.held_out)
    pool = lw.ExpertPool([lw.Adapter.from_pretrained(HERE / "pool" / name) for name in data])
    engine = lw.Composer(model, pool, tokenizer=tokenizer)
    alike = dict.fromkeys(pool.names, 1 / len(pool))
    ways = {
        "base": {name: {} for name in held},
        "all alike": dict.fromkeys(held, alike),
        "own adapter": {name: {name: 1.0} for name in held},
    }
    for way, mixtures in ways.items():
        print(f"{way:12s} {mean_loss(engine, held, mixtures):.3f}", flush=True)
    router = lw.router(asked.router, pool)
    settings = {"steps": asked.steps, "batch_size": asked.batch_size, "lr": asked.lr, "seed": asked.seed}
    router.fit(
        engine, data, evaluation=held, evaluate_every=max(1, asked.steps // 4), checkpoint=asked.checkpoint, **settings
    )
    report = router.training_report
    for step, loss in report.evaluations:
        print(f"{router.name:12s} {loss:.3f}  after {step} steps")
    print(
        f"{report.seconds:.0f} s of training, {report.tokens} tokens, entropy {report.entropy[-1]:.2f}, dead {report.dead}"
    )
    if asked.out is not None:
        router.save_pretrained(asked.out, pool=pool)
        plot_training(report, asked.out / "curve.png")


def task_of(path: Path, split: str, count: int) -> lw.Task:
    """The first `count` rows of a split."""
    rows = [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if row["split"] == split]
    return lw.Task([(row["input"], row["target"]) for row in rows[:count]], instruction=rows[0]["definition"])


def mean_loss(engine: lw.Composer, tasks: Mapping[str, lw.Task], mixtures: Mapping[str, Mapping[str, float]]) -> float:
    """Over the target tokens of all rows, each task under its mixture."""
    total, count = 0.0, 0
    for name, task in tasks.items():
        sizes = [len(engine.tokenizer(f" {target}")["input_ids"]) + 1 for _, target in task.examples]
        with engine.activate(mixtures[name]):
            found = losses(engine.model, engine.tokenizer, task, task.examples)
        total += sum(loss * size for loss, size in zip(found, sizes, strict=True))
        count += sum(sizes)
    return total / count


if __name__ == "__main__":
    main()
