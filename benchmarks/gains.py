"""How much each adapter of the pool helps each unseen task: the fall of the target's loss, adapter by adapter.

    python -m benchmarks --data DATA gains

DATA holds unseen/*.jsonl and MANIFEST.json. A gain is the base model's mean loss per example on the first test rows of a
task, in nats, less the loss with the one adapter at weight 1. `retrieval` compares candidate lists with the file. Tasks that
it holds already are kept, so that an interrupted run goes on; --fresh measures all of them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import loraweave as lw
from benchmarks._run import Run, console
from benchmarks._store import DATA
from loraweave.composer.batches import batch, encode, mean_losses
from loraweave.demo import read_rows

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    file: Annotated[Path, typer.Option(help="the JSON file of gains")] = DATA / "gains.json",
    num_items: Annotated[int, typer.Option(help="test rows of each task")] = 16,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure also what the file holds")] = False,
) -> None:
    """Measures the gain of every adapter on every unseen task."""
    run: Run = context.obj
    known = json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.is_file() and not fresh else {}
    # bf16: the adapters stay fp32, and differences between adapters are far above its rounding
    model, tokenizer = lw.load_base(dtype=torch.bfloat16)
    engine = lw.Composer(model, [lw.Adapter.from_pretrained(path) for path in run.adapters()])
    names = list(engine.pool.names)
    for task, entry in track(run.entries("unseen").items(), "gains", console=console, disable=not console.is_terminal):
        if task not in known:
            rows = [row for row in read_rows(run.data / entry["file"]) if row["split"] == "test"][:num_items]
            known[task] = _task_gains(engine, model, tokenizer, names, rows)
            settings = {"base_model": model.name_or_path, "dtype": "bfloat16", "num_items": num_items}
            file.write_text(json.dumps({**settings, "tasks": known}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{len(known)} tasks x {len(names)} adapters in {file}")


def _task_gains(engine: Any, model: Any, tokenizer: Any, names: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    task = lw.Task([(row["input"], row["target"]) for row in rows], instruction=rows[0]["definition"])
    prompts = [task.prompt(text) for text, _ in task.examples]
    prepared = batch(model, tokenizer, encode(model, tokenizer, prompts, [target for _, target in task.examples]))
    with torch.no_grad():
        base_B = mean_losses(model, prepared).double()
        gains = {}
        for name in names:
            with engine.activate({name: 1.0}):
                gains[name] = round(float((base_B - mean_losses(model, prepared).double()).mean()), 4)
    return {"base_loss": round(float(base_B.mean()), 4), "gains": gains}
