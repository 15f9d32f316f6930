"""The table of benchmarks/routers.py quality: right answers by way and kind of task, with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _unseen_store import Key, Measured
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

UNSEEN = Path(__file__).resolve().parent / "data" / "unseen.json"
DRAWS = 2000
# on tasks without an adapter the oracle is a LoRA that was trained on the task, of benchmarks/data/unseen.json
ORACLE = "oracle"
RETRIEVED = "retrieved_first"


def print_report(measured: Mapping[Key, Measured], entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Only tasks that `base` was measured on; a way that lacks some of them is left out of that column."""
    known: dict[tuple[str, str], list[np.ndarray]] = {}
    for key, found in sorted(measured.items(), key=lambda pair: pair[0].seed):
        known.setdefault((key.way, key.task), []).append(found.right_N)
    groups = {
        "pool": [task for way, task in known if way == "base" and entries[task]["relation"] is None],
        "unseen": [
            task for way, task in known if way == "base" and entries[task]["relation"] not in (None, "compositional")
        ],
        "joined": [task for way, task in known if way == "base" and entries[task]["relation"] == "compositional"],
    }
    counts = {task: len(found[0]) for (way, task), found in known.items() if way == "base"}
    for way, task, right_N in _from_unseen(counts):
        known.setdefault((way, task), [right_N])
    seeds = {way: max(len(found) for (other, _), found in known.items() if other == way) for way, _ in known}
    shares = ["share of the oracle's, pool", "above retrieved_first, unseen"]
    table = Table("way", "seeds", *_columns(groups, counts), *shares, box=MARKDOWN)
    rows = [(way, {name: _draws(known, way, tasks) for name, tasks in groups.items()}) for way in seeds]
    oracle_R, retrieved_R = (dict(rows).get(way, {}).get(of) for way, of in ((ORACLE, "pool"), (RETRIEVED, "unseen")))
    for way, drawn in sorted(rows, key=lambda row: -1 if row[1]["pool"] is None else -row[1]["pool"][0]):
        share = "" if drawn["pool"] is None or oracle_R is None else _cell(drawn["pool"] / oracle_R)
        above = "" if drawn["unseen"] is None or retrieved_R is None else _cell(drawn["unseen"] - retrieved_R)
        table.add_row(way, str(seeds[way]), *(_cell(drawn[name]) for name in groups), share, above)
    Console(width=220).print(table)


def _columns(groups: Mapping[str, Sequence[str]], counts: Mapping[str, int]) -> list[str]:
    return [f"{name}: {len(tasks)} tasks, {sum(counts[task] for task in tasks)} items" for name, tasks in groups.items()]


def _draws(known: Mapping[tuple[str, str], list[np.ndarray]], way: str, tasks: Sequence[str]) -> np.ndarray | None:
    """The mean over tasks: first as measured, then resampled by items within each task, by the same draws for all ways."""
    if not tasks or any((way, task) not in known for task in tasks):
        return None
    total_R = np.zeros(DRAWS + 1)
    for number, task in enumerate(tasks):
        right_N = np.mean(known[way, task], axis=0)
        chosen = np.random.default_rng(number).integers(0, len(right_N), size=(DRAWS, len(right_N)))
        total_R += np.concatenate([[right_N.mean()], right_N[chosen].mean(axis=1)])
    return total_R / len(tasks)


def _cell(draws_R: np.ndarray | None) -> str:
    if draws_R is None:
        return ""
    low, high = np.percentile(draws_R[1:], [2.5, 97.5])
    return f"{draws_R[0]:.3f} [{low:.3f}, {high:.3f}]"


def _from_unseen(counts: Mapping[str, int]) -> list[tuple[str, str, np.ndarray]]:
    rows = [Measured.of(row) for row in json.loads(UNSEEN.read_text())["rows"]]
    return [
        (found.key.way, found.key.task, found.right_N[: counts[found.key.task]])
        for found in rows
        if found.key.way == ORACLE and found.key.task in counts
    ]
