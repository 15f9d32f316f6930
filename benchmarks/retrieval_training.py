"""Does fine-tuning the sentence encoder on some tasks help to find others? Recall on tasks that it never saw.

    python benchmarks/retrieval_training.py --data DATA --out runs/encoder            three splits of the tasks
    python benchmarks/retrieval_training.py --data DATA --out runs/choose --choose    inside the training tasks, for settings

DATA holds pool/*.jsonl and MANIFEST.json. Each split trains on about 60 % of the tasks (their training rows) and searches
for the others: keys are the mean of a task's first 20 training inputs, queries its test inputs, alone and in groups of five,
without any description. "own keys" has the keys of the held-out tasks, "all keys" those of every task. --choose does the
same inside the training tasks of each split, so that no setting is chosen on a held-out task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from loraweave.hub.search import unit
from loraweave.retrieval.embedders.sentence import Sentence
from loraweave.retrieval.training import train_encoder

KS = (1, 3, 5)
INPUTS_PER_KEY = 20
INPUTS_PER_QUERY = 5
NUM_QUERIES = 40
TRAINING_SHARE = 0.6
# {what is searched and how: recall at each of KS}
Recalls = dict[str, list[float]]

console = Console(width=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pool/*.jsonl and MANIFEST.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for encoders, checkpoints and figures")
    parser.add_argument("--splits", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--choose", action="store_true", help="hold out a part of the training tasks instead")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--inputs-per-task", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = _inputs(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    results = [_split(options, number, train, test) for number in options.splits]
    (options.out / "recalls.json").write_text(json.dumps(results, indent=1) + "\n")
    _print(results)


def _split(
    options: argparse.Namespace, number: int, train: Mapping[str, Sequence[str]], test: Mapping[str, Sequence[str]]
) -> dict[str, Recalls]:
    seen, held_out = _parts(list(train), number)
    known = list(train)
    if options.choose:
        known = seen
        seen, held_out = _parts(seen, number)
    folder = options.out / f"split{number}"
    if not folder.is_dir():
        train_encoder(
            {name: train[name] for name in seen},
            folder,
            steps=options.steps,
            inputs_per_task=options.inputs_per_task,
            lr=options.lr,
            temperature=options.temperature,
            seed=number,
            checkpoint=options.out / f"split{number}.checkpoint",
        )
    console.print(f"split {number}: trained on {len(seen)} tasks, held out {', '.join(held_out)}", highlight=False)
    return {
        label: _recalls(encoder, train, test, held_out, known)
        for label, encoder in (("before", Sentence()), ("after", Sentence(folder=folder)))
    }


def _parts(names: Sequence[str], number: int) -> tuple[list[str], list[str]]:
    order = np.random.default_rng(number).permutation(len(names))
    count = round(TRAINING_SHARE * len(names))
    return [names[i] for i in sorted(order[:count])], [names[i] for i in sorted(order[count:])]


def _recalls(
    encoder: Sentence,
    train: Mapping[str, Sequence[str]],
    test: Mapping[str, Sequence[str]],
    held_out: Sequence[str],
    known: Sequence[str],
) -> Recalls:
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


def _print(results: Sequence[Mapping[str, Recalls]]) -> None:
    table = Table(box=MARKDOWN)
    for column in ("query, searched among", "encoder", *(f"recall@{k}" for k in KS), "recall@1 of each split"):
        table.add_column(column)
    for kind in results[0]["before"]:
        for label in ("before", "after"):
            rows = np.array([result[label][kind] for result in results])
            each = ", ".join(f"{value:.3f}" for value in rows[:, 0])
            table.add_row(kind, label, *(f"{value:.3f}" for value in rows.mean(axis=0)), each)
    console.print(table)


def _inputs(data: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and test inputs of every pool task whose rows are there."""
    manifest = json.loads((data / "MANIFEST.json").read_text(encoding="utf-8"))["groups"]["pool"]
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for entry in manifest:
        if not (data / entry["file"]).is_file():
            continue
        for line in (data / entry["file"]).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            parts[row["split"]].setdefault(entry["task"], []).append(row["input"])
    return parts["train"], parts["test"]


if __name__ == "__main__":
    main()
