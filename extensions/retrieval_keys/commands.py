"""`loraweave hub train-encoder`: fine-tune the search's encoder on a hub's texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from loraweave.extend.commands import DEFAULT_HUB, HubOption, JsonOption, SeedOption, note, open_hub, print_json

hub = typer.Typer()


@hub.command("train-encoder", epilog="Example: loraweave hub train-encoder encoder --steps 60 --checkpoint encoder-state")
def train_encoder(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the encoder goes; hub search --encoder takes it.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 60,
    lr: Annotated[float, typer.Option(help="The learning rate at its highest.")] = 2e-5,
    seed: SeedOption = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keeps the state here; the same command goes on from it.")
    ] = None,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune the search's encoder on the sample inputs of the hub's adapters."""
    from loraweave.extensions.retrieval_keys import training

    with open_hub(hub) as opened:
        shown = sys.stderr.isatty()
        trained = training.train_encoder(opened, out, steps=steps, lr=lr, seed=seed, checkpoint=checkpoint, progress=shown)
    tasks = json.loads((out / "encoder.json").read_text(encoding="utf-8"))["tasks"]
    if as_json:
        print_json({"out": out, "id": trained.id, "tasks": tasks})
    note(f"saved the encoder to {out}; it learned from the inputs of {len(tasks)} adapters")
