"""How much a composition hangs on the processor's rounding: the same search in bf16, in fp32, and on permuted rows.

    python -m benchmarks --data DATA rounding
    python -m benchmarks --data DATA rounding --tasks antonym,plural --methods gradient,auto

Each task of the pool is taken as if unseen, without its own adapter. "permuted" has the same examples, test items and seed;
the examples stand in reverse order, so that every sum over a batch rounds otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer

import loraweave as lw
from benchmarks._data import Key
from benchmarks._run import Run, Table
from benchmarks._unseen_ways import Case, find
from benchmarks.unseen import Asked, open_case, same_skill

TASKS = "antonym,country_capital,passive,past_tense,alphabetical_first_3,pick_middle_5,plural,uppercase"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "bf16, permuted": torch.bfloat16}

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="of the pool")] = TASKS,
    methods: Annotated[str, typer.Option(help="ways of `unseen`")] = "gradient,few_shot,auto",
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 50,
) -> None:
    """The share of right answers of each method in each rounding, and its spread over them."""
    run: Run = context.obj
    names = methods.split(",")
    models = {name: lw.load_base(dtype=dtype) for name, dtype in DTYPES.items() if "permuted" not in name}
    asked = Asked(dict.fromkeys(tasks.split(","), ""), names, [run.seed], [5], 20, 40, num_test, left_out=True)
    right: dict[tuple[str, str], dict[str, float]] = {}
    for task in asked.relations:
        with run.hub(same_skill(task)) as hub:
            for rounding in DTYPES:
                for name in names:
                    model, tokenizer = models[rounding.split(",")[0]]
                    case = open_case(run, asked, model, tokenizer, hub, Key(task, name, 5, run.seed))
                    found = _turned(case) if "permuted" in rounding else case
                    right.setdefault((task, name), {})[rounding] = found.score(find(found, name)).value
    run.show(*(table(name, asked.relations, right) for name in names))


def _turned(case: Case) -> Case:
    unseen = case.unseen
    task = replace(unseen.task, examples=tuple(reversed(unseen.task.examples)))
    return replace(case, unseen=replace(unseen, task=task))


def table(name: str, tasks: Any, right: dict[tuple[str, str], dict[str, float]]) -> Table:
    """A row for each task, and the mean; "spread" is the largest less the smallest."""
    made = Table(f"{name}: right answers by rounding, five examples", ("task", *DTYPES, "spread"))
    cells = np.array([[right[task, name][rounding] for rounding in DTYPES] for task in tasks])
    for label, row in [*zip(tasks, cells, strict=True), ("mean", cells.mean(axis=0))]:
        made.add(label, *(f"{value:.3f}" for value in row), f"{np.ptp(row):.3f}")
    return made
