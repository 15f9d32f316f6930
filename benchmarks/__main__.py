"""Runs every measurement: shared options come before its name, its own after it.

\b
    python -m benchmarks --cpu --rounds 5 live prefill          a measurement; each has its own --help
    python -m benchmarks --out runs/unseen unseen               one that resumes after an interruption
    python -m benchmarks --out runs/unseen --report unseen      only the tables measured so far
    python -m benchmarks --save live live decode                the figures go to data/figures/live.json and to TABLES.md
    python -m benchmarks tables                                 rewrites TABLES.md from data
"""

from __future__ import annotations

import ast
import os
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from benchmarks import _data
from benchmarks._run import Run, console

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("[a-z]*.py") if "\napp = " in path.read_text(encoding="utf-8"))


class Measurements(TyperGroup):
    """A command for each file that has an `app`; a file is imported when it is run."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = cmd_name.replace("-", "_")
        if name not in NAMES:
            return super().get_command(ctx, cmd_name)
        return typer.main.get_command(import_module(f"benchmarks.{name}").app)

    def invoke(self, ctx: Any) -> None:
        super().invoke(ctx)
        run: Run = ctx.obj
        if run.save:
            if run.shown:
                console.print(f"kept in {_data.append(run.save, sys.argv[1:], run.shown)}")
            tables()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Measurements"):
            formatter.write_dl([*((name, _first_line(name)) for name in NAMES), ("tables", tables.__doc__)])


def _first_line(name: str) -> str:
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


# plain help: Rich's would import every measurement for its first line
app = typer.Typer(
    cls=Measurements, help=__doc__, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def shared(
    context: typer.Context,
    rounds: Annotated[int | None, typer.Option(help="at most this many rounds")] = None,
    seconds: Annotated[float | None, typer.Option(help="no round that would end later")] = None,
    threads: Annotated[int, typer.Option(help="of torch and of numpy's products; 0 leaves their own numbers")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="count processor time, for one thread on a busy machine")] = False,
    seed: Annotated[int, typer.Option(help="of what is drawn, where there is one seed")] = 0,
    data: Annotated[Path, typer.Option(help="has MANIFEST.json, pool/*.jsonl, unseen/*.jsonl")] = Run.data,
    pool: Annotated[Path, typer.Option(help="folder of adapter folders")] = Run.pool,
    out: Annotated[Path | None, typer.Option(help="keeps what is measured, so that an interrupted run goes on")] = None,
    report: Annotated[bool, typer.Option("--report", help="only the tables of what --out holds")] = False,
    base: Annotated[
        str | None, typer.Option(help="base model as load_base names it, where a measurement has no own")
    ] = None,
    save: Annotated[str | None, typer.Option(help="section of TABLES.md that the figures are added to")] = None,
) -> None:
    import torch
    import transformers
    from threadpoolctl import threadpool_limits

    if base:
        # for servers, too, which inherit it
        os.environ["LORAWEAVE_BASE"] = base
    # ends as by an exception, so that what was started ends too
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # peft and transformers announce names that will change; in every forward, which would be timed
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
        threadpool_limits(threads)
    context.obj = Run(rounds, seconds, threads, cpu, seed, data, pool, out, report, save)


@app.command()
def tables() -> None:
    """Writes TABLES.md from data."""
    _data.PAGE.write_text(_data.page(), encoding="utf-8")


if __name__ == "__main__":
    app()
