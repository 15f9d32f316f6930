"""`loraweave train`: an adapter for each file of rows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from loraweave.cli._flags import BaseOption, JsonOption, SeedOption
from loraweave.cli._inputs import ADAPTER_FILE, load_model, read_rows, require_free
from loraweave.cli._printing import print_json, print_rows

TRAIN_EXAMPLE = "Example: loraweave train antonym.jsonl plural.jsonl --out trained --rank 8 --steps 60"
NUM_SAMPLES = 20


def train(
    files: Annotated[
        list[Path], typer.Argument(metavar="JSONL|CSV", exists=True, dir_okay=False, help="One file, one task, one adapter.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", file_okay=False, help="Gets a PEFT folder for each file.")],
    base: BaseOption = None,
    instruction: Annotated[
        list[str] | None, typer.Option(help="What a task asks for: once for each file, in order; from the rows by default.")
    ] = None,
    split: Annotated[str, typer.Option(help='Of rows with a field "split", those of this one.')] = "train",
    rank: Annotated[int, typer.Option(min=1, help="The adapters' rank.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps for each adapter.")] = 60,
    lr: Annotated[float, typer.Option(min=0.0, help="The highest learning rate.")] = 3e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of each task in a step.")] = 8,
    jobs: Annotated[int, typer.Option(min=1, help="How many adapters are trained at once, at most.")] = 4,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the rows that is not trained on but tells which factors are the best.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many evaluations, 10 steps apart, without a lower held-out loss."),
    ] = None,
    seed: SeedOption = 0,
    samples: Annotated[int, typer.Option(min=0, help="Sample inputs kept in each card, which searches read.")] = NUM_SAMPLES,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", file_okay=False, help="Where work is kept; OUT/.checkpoint by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter for each file. After an interruption the same command goes on where it stopped."""
    names = [path.stem for path in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise typer.BadParameter(f"two files would make the adapter {twice[0]!r}; rename one")
    if instruction and len(instruction) != len(files):
        raise typer.BadParameter(f"--instruction is given {len(instruction)} times for {len(files)} files; once for each")
    for name in names:
        require_free(out / name, ADAPTER_FILE)
    read = {path.stem: read_rows(path, split=split) for path in files}
    import loraweave as lw

    asked = instruction or [rows.instruction for rows in read.values()]
    tasks = {
        name: lw.Task(rows.examples(), instruction=text) for (name, rows), text in zip(read.items(), asked, strict=True)
    }
    model, tokenizer = load_model(base)
    trained = lw.train_adapters(
        model,
        tokenizer,
        tasks,
        rank=rank,
        steps=steps,
        jobs_per_batch=jobs,
        seed=seed,
        lr=lr,
        batch_size=batch_size,
        held_out=held_out,
        patience=patience,
        checkpoint=checkpoint or out / ".checkpoint",
        progress=sys.stderr.isatty(),
    )
    results = []
    for name, adapter in trained.items():
        inputs = [text for text, _ in tasks[name].examples][:samples]
        card = {**adapter.card, "description": tasks[name].instruction, "examples": inputs}
        folder = replace(adapter, card=card).save_pretrained(out / name)
        results.append({"name": name, "rows": len(tasks[name].examples), "rank": adapter.rank, "out": str(folder)})
    if as_json:
        print_json(results)
    else:
        print_rows(("name", "rows", "rank", "folder"), [tuple(result.values()) for result in results])
