"""`loraweave study`: run the missing cells of a study and print its tables."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from loraweave.extend import ShownTable
from loraweave.extend.commands import JsonOption, note, print_json, print_table

app = typer.Typer()


@app.command(epilog="Example: loraweave study examples/study.yaml --out runs/study")
def study(
    file: Annotated[Path, typer.Argument(metavar="YAML", exists=True, dir_okay=False, help="Tasks, methods and settings.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="Cells, tables and report; beside the file by default."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Also score by a function of an answer and its accepted targets."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Spread the work over N processes; -1 for as many as there are cores.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the missing cells of a study, and write its tables, plots and report; exit status 1 if a cell failed."""
    functions = _read_functions(metric or ())
    from loraweave.extensions.study.running import study as run

    results = run(file, out=out, metrics=functions, n_jobs=workers)
    if as_json:
        print_json(
            {"out": results.folder, "failures": results.failures, "figures": [vars(figure) for figure in results.figures]}
        )
    else:
        for title, columns, rows in results.tables():
            typer.echo(title)
            print_table(ShownTable.of(columns, rows))
        for cell, why in results.failures.items():
            note(f"failed: {cell}: {why}")
        note(f"wrote {results.folder / 'report.html'}, and the tables, plots and answers beside it")
    if results.failures:
        raise typer.Exit(1)


def _read_functions(given: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Import the functions of `--metric`; a study's file cannot name any, since importing a module runs its code."""
    functions: dict[str, Callable[..., Any]] = {}
    for text in given:
        module, _, name = text.partition(":")
        try:
            functions[name] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise typer.BadParameter(f"--metric {text!r} cannot be imported ({error}); give MODULE:FUNCTION") from None
    return functions
