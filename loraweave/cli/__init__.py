"""The command line. Thin: every command calls the public API, and imports what is heavy only when it runs."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from loraweave import __version__
from loraweave.cli import adapters, compositions, doctor, servers  # noqa: F401
from loraweave.cli._application import INTERRUPTED, JsonOption, SeedOption, app, progress_to_stderr, quiet_libraries


def main() -> None:
    """Run the command `loraweave`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a name that the terminal's encoding lacks must not end the command
        sys.stdout.reconfigure(errors="replace")
    if "--debug" not in sys.argv:
        quiet_libraries()
    try:
        app(prog_name="loraweave")
    except KeyboardInterrupt:
        # outside of a command, for instance while modules are loaded
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"loraweave {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works after any command.")] = False,
) -> None:
    progress_to_stderr()


@app.command(epilog="Example: loraweave demo --task plural_upper --budget 20")
def demo(
    task: Annotated[str, typer.Option(help="A task that no adapter of the pool was trained for.")] = "pick_verb_5",
    pool: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of adapter folders; examples/pool by default."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of tasks with MANIFEST.json; examples/data by default."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="How many adapters to choose from.")] = 20,
    budget: Annotated[int, typer.Option(min=1, help="How many mixtures the search tries.")] = 40,
    seed: SeedOption = 0,
    num_test: Annotated[int, typer.Option(min=1, help="How many test inputs to answer.")] = 50,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the base's chat template, in turns.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compose stored adapters for a task nobody trained, and compare with the base model."""
    from loraweave.demo import run

    run(pool=pool, data=data, task=task, k=k, budget=budget, seed=seed, num_test=num_test, as_json=as_json, chat=chat)
