"""What an adapter keeps in a base of another family, taught by its answers: shares of the gain, beside labels and a control.

    python -m benchmarks --out runs/families families --base qwen2.5-coder-0.5b

`distil_adapter` reads the inputs of the task's training rows, the default base answers them with its adapter, and a LoRA of
the other base learns these answers. Beside it stands the same training on the rows' own labels, and as the control on what
the default base answers alone. Scores are exact matches on test items; `predicted` and `before` are the card's two shares
of the inputs that judge. Cells are kept in --out.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Annotated, Any

import typer

import loraweave as lw
from benchmarks._data import kept
from benchmarks._run import Run, Table, pairs
from loraweave.composer.model.scoring import evaluate
from loraweave.extensions.transfer import distil_adapter
from loraweave.hub.base import fast_dtype

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    base: Annotated[str, typer.Option(help="the other base, as load_base names it")] = "qwen2.5-coder-0.5b",
    adapters: Annotated[str, typer.Option(help="of the example pool")] = "passive,plural,pick_animal_5,antonym",
    num_inputs: Annotated[int, typer.Option(help="training inputs; every fourth judges")] = 200,
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 50,
    steps: Annotated[int, typer.Option(help="of each training")] = 60,
) -> None:
    """A row for each adapter: both bases, the old one with it, and the new one by its answers, by labels, by the control."""
    run: Run = context.obj
    folder = run.folder()
    load = cache(lambda name: lw.load_base(name, dtype=fast_dtype()))

    def score(name: str | None, task: lw.Task, test: list[tuple[str, str]], adapter: lw.Adapter | None = None) -> float:
        model, tokenizer = load(name)
        with nullcontext() if adapter is None else lw.Composer(model, [adapter]).activate({adapter.name: 1.0}):
            return evaluate(model, tokenizer, task, test).value

    def measured(adapter: lw.Adapter) -> dict[str, Any]:
        rows = run.rows(adapter.name)
        train, test = pairs(rows, "train")[:num_inputs], pairs(rows, "test")[:num_test]
        task = lw.Task([], instruction=rows[0]["definition"], labels=run.entries()[adapter.name]["labels"])
        silent = replace(adapter, layers={name: replace(f, b_OR=0 * f.b_OR) for name, f in adapter.layers.items()})
        inputs = [text for text, _ in train]
        cells: dict[str, Any] = {"old": score(None, task, test), "with it": score(None, task, test, adapter)}
        cells["new"] = score(base, task, test)
        for way, teacher in (("answers", adapter), ("control", silent)):
            made = distil_adapter(teacher, *load(None), *load(base), task, inputs, least=0.0, steps=steps)
            cells[way] = score(base, task, test, made)
            if way == "answers":
                cells |= {
                    name: made.card["transfer"][source] for name, source in (("before", "before"), ("predicted", "answers"))
                }
        labelled = replace(task, examples=[row for place, row in enumerate(train) if place % 4])
        made = lw.train_adapters(*load(base), {adapter.name: labelled}, steps=steps)[adapter.name]
        return cells | {"labels": score(base, task, test, made)}

    columns = ("old", "with it", "new", "before", "predicted", "answers", "labels", "control")
    table = Table(
        f"shares of {num_test} test items right: the old base alone and with the adapter, {base} alone; the shares of the "
        f"judging answers of {num_inputs} inputs that it gives before and after {steps} steps; right by the old answers, by "
        "labels, and by the answers of the old base without the adapter",
        ("adapter", *columns, "kept of the gain"),
    )
    for name in adapters.split(","):
        adapter = lw.Adapter.from_pretrained(run.pool / name)
        cells = kept(folder / f"{name}.json", lambda adapter=adapter: measured(adapter))
        share = (cells["answers"] - cells["new"]) / (cells["with it"] - cells["old"])
        table.add(name, *(f"{cells[column]:.2f}" for column in columns), f"{share:.2f}")
    run.show(table)
