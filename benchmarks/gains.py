"""How much each adapter of the pool helps each unseen task: the fall of the target's loss, adapter by adapter.

    python benchmarks/gains.py --data DATA --out benchmarks/data/gains.json

DATA holds unseen/*.jsonl and MANIFEST.json. A gain is the base model's mean loss per example on the first test rows of a
task, in nats, less the loss with the one adapter at weight 1. `benchmarks/retrieval.py` compares candidate lists with the
file. Tasks that the file holds already are kept, so that an interrupted run goes on; --fresh measures all of them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

import loraweave as lw
from loraweave.composer.batches import batch, encode, mean_losses

ROOT = Path(__file__).resolve().parents[1]

console = Console()


def main(
    data: Annotated[Path, typer.Option(help="folder with unseen/*.jsonl and MANIFEST.json")],
    pool: Annotated[Path, typer.Option(help="folder of adapter folders")] = ROOT / "examples" / "pool",
    out: Annotated[Path, typer.Option(help="the JSON file of gains")] = ROOT / "benchmarks" / "data" / "gains.json",
    num_items: Annotated[int, typer.Option(help="test rows of each task")] = 16,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure also what the file holds")] = False,
) -> None:
    """Measures the gain of every adapter on every unseen task."""
    torch.set_num_threads(threads)
    entries = json.loads((data / "MANIFEST.json").read_text(encoding="utf-8"))["groups"]["unseen"]
    known = json.loads(out.read_text(encoding="utf-8"))["tasks"] if out.is_file() and not fresh else {}
    # bf16: the adapters stay fp32, and differences between adapters are far above its rounding
    model, tokenizer = lw.load_base(dtype=torch.bfloat16)
    adapters = [lw.Adapter.from_pretrained(path) for path in sorted(pool.iterdir()) if path.is_dir()]
    engine = lw.Composer(model, lw.ExpertPool(adapters))
    names = [adapter.name for adapter in adapters]
    for entry in track(entries, description="gains", console=console, disable=not console.is_terminal):
        if entry["task"] in known:
            continue
        known[entry["task"]] = _task_gains(engine, model, tokenizer, names, _rows(data, entry, num_items))
        settings = {"base_model": model.name_or_path, "dtype": "bfloat16", "num_items": num_items}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**settings, "tasks": known}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{len(known)} tasks x {len(names)} adapters in {out}")


def _rows(data: Path, entry: dict[str, Any], num_items: int) -> list[dict[str, Any]]:
    lines = (data / entry["file"]).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "test"][:num_items]


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


if __name__ == "__main__":
    typer.run(main)
