"""The command line. Thin: every command calls the public API, and imports what is heavy only when it runs."""

from __future__ import annotations

import io
import logging
import sys
from functools import partial
from typing import Annotated

import typer

from loraweave import __version__
from loraweave.cli import adapters, compositions  # noqa: F401
from loraweave.cli._application import INTERRUPTED, app, progress_to_stderr, quiet_libraries


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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works after any command.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also show what loraweave logs.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show results and errors, and no notes.")] = False,
) -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    if verbose or quiet:
        log = logging.getLogger("loraweave")
        context.call_on_close(partial(log.setLevel, log.level))
        log.setLevel(logging.ERROR if quiet else logging.DEBUG)
    progress_to_stderr()
