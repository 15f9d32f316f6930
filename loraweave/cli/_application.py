"""The parts that commands share: errors as one line and an exit status, `--debug` wherever it is written, flags, output.

Tables and JSON go to stdout, notes and progress to stderr. The root group also takes in the commands of extensions and of
other packages.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from loraweave import registry
from loraweave.common.names import printable
from loraweave.errors import BaseModelUnverified, FormulaError, LoraweaveError, PluginFailed
from loraweave.types import Record

if TYPE_CHECKING:
    from rich.table import Table

    from loraweave.hub.compositions import StoredComposition

INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__
# the parser's words and ours
WORDS = {
    "No such command": "there is no command",
    ". Did you mean": ", did you mean",
    "Missing command": "give a command",
    "Got unexpected extra argument(s)": "too many arguments",
    "Option '": "the option '",
    "requires an argument": "needs a value",
    "Value error, ": "",
    "dir '": "folder '",
    "Input should be": "must be",
    "a valid integer, unable to parse string as an integer": "a whole number",
    "a valid number, unable to parse string as a number": "a number",
}
# in a pipe a row is one line of any length, so that grep and cut work
PIPE_WIDTH = 10_000
# flags of the root group that may stand after any command
ANYWHERE = ("--debug", "-v", "--verbose", "-q", "--quiet")
PURPOSES = {
    "Compose": ("demo", "compose", "eval", "explain"),
    "Merge and train": ("merge", "train", "export"),
    "Keep": ("hub", "ui"),
    "Serve": ("serve", "load", "verify"),
    "Measure": ("study", "doctor"),
}


class Application(TyperGroup):
    """The root group of commands. Exit status 0 done, 1 a named error on one line of stderr, 2 wrong usage, 130 interrupted.

    The error of a formula is followed by the formula and a caret. With --debug an error keeps its traceback.

    The file `commands.py` of an extension, or the module of an entry point `loraweave.commands`, has a `typer.Typer` named
    `app`, whose commands stand beside the core's, or one named `hub`, whose commands join those of `loraweave hub`. The
    core's commands take precedence over others of the same name.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for name, module in registry.brought("commands").items():
            try:
                self._add_commands(vars(importlib.import_module(module)))
            except Exception as error:
                # the other commands still run
                why = f"{type(error).__name__}: {error}"
                say(f"warning: the commands of {name!r} ({module}) cannot be used: {why}")
        _name_values(self)

    def _add_commands(self, module: dict[str, Any]) -> None:
        if not {"app", "hub"} & set(module):
            raise PluginFailed("it has neither a typer.Typer named app nor one named hub")
        for name, group in (("app", self), ("hub", self.commands.get("hub"))):
            if name in module and isinstance(group, TyperGroup):
                # as the help of our own commands is written
                module[name].rich_markup_mode = None
                for called, command in get_group(module[name]).commands.items():
                    group.commands.setdefault(called, command)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # people write these flags at the end of the line that failed; they belong to the root, so they are moved there
        command: Any = self
        flags, others, end = list[str](), list[str](), args.index("--") if "--" in args else len(args)
        for word in args[:end]:
            # an option's value may look like a flag
            is_value = any({*others[-1:]} & {*it.opts} for it in command.params if not getattr(it, "is_flag", True))
            (flags if word in ANYWHERE and not is_value else others).append(word)
            command = getattr(command, "commands", {}).get(word, command)
        with _wrong_usage_as_a_line():
            rest: list[str] = super().parse_args(ctx, [*flags, *others, *args[end:]])
        return rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        grouped = {name for names in PURPOSES.values() for name in names}
        others = [name for name in self.list_commands(ctx) if name not in grouped]
        for purpose, names in {**PURPOSES, "Others": others}.items():
            listed = [(name, self.commands[name]) for name in names if name in self.commands]
            if listed:
                with formatter.section(purpose):
                    formatter.write_dl([(f"{name:<7}", command.short_help) for name, command in listed])

    def invoke(self, ctx: Any) -> Any:
        try:
            with _unverified_bases_as_lines(), _wrong_usage_as_a_line():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (LoraweaveError, OSError) as error:
            # a reader that went away is no error of ours: click ends quietly
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            # the caret below a formula needs its line
            lines = str(error).split("\n") if isinstance(error, FormulaError) else [str(error)]
            say(f"{type(error).__name__}: {lines[0]}")
            for line in lines[1:]:
                typer.echo(printable(line), err=True)
            raise typer.Exit(1) from None


@contextmanager
def _wrong_usage_as_a_line() -> Iterator[None]:
    """Print a wrong use of a command as a line of stderr that names the command's help, and leave with status 2."""
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        value, text = getattr(error, "param", None), str(error.message).rstrip(".")
        for theirs, ours in WORDS.items():
            text = text.replace(theirs, ours)
        if hasattr(error, "possibilities"):
            known = [option for parameter in error.ctx.command.params for option in parameter.opts]
            text = f"there is no option {error.option_name}{registry.nearest(error.option_name, known)}"
        elif value is not None:
            name = value.opts[0] if value.param_type_name == "option" else value.metavar
            text = f"{name} {text or 'is missing'}" if not text or text.startswith("must") else f"{name}: {text}"
        say(f"UsageError: {text}" + (f"; `{error.ctx.command_path} -h` explains" if error.ctx else ""))
        raise typer.Exit(2) from None


def _name_values(group: TyperGroup) -> None:
    """Have the help of all commands say N for a number and NAME for an option --name of text, without Python's types.

    The list of commands has the whole first sentence of each.
    """
    for command in group.commands.values():
        command.short_help = command.get_short_help_str(PIPE_WIDTH)
        if isinstance(command, TyperGroup):
            _name_values(command)
        parameters: list[Any] = command.params
        for value in parameters:
            if value.param_type_name == "argument":
                value.metavar = value.metavar or str(value.name).upper()
                value.display_type_rich = lambda ctx: None
            elif value.metavar is None and not value.is_flag and not value.type_descriptor.is_choice:
                is_number = {"int", "float"} & {value.bare_type()}
                value.metavar = "N" if is_number else str(value.name).upper().replace("_", "-")


app = typer.Typer(
    cls=Application,
    help="Find stored LoRA adapters, weigh them, and compose them into new skills.",
    epilog="Start with: loraweave demo",
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def quiet_libraries() -> None:
    """Silence other libraries' log records below errors, such as start-up notes on missing parts, and FutureWarnings.

    Libraries that set a level of their own keep it, except the part of torch that would warn before every command.
    """
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("loraweave").setLevel(logging.WARNING)
    # torch sets a level of its own when it is imported
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


@contextmanager
def _unverified_bases_as_lines() -> Iterator[None]:
    """Print each different BaseModelUnverified warning once, as a line of stderr; show other warnings as usual."""
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", BaseModelUnverified)
        show_warning = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
            if not issubclass(category, BaseModelUnverified):
                show_warning(message, category, *place, **rest)
            elif str(message) not in said:
                said.add(str(message))
                say(f"warning: {message}")

        warnings.showwarning = shown
        yield


def one_line(text: str) -> str:
    """Return the text on one line, without control characters, which could come from a damaged or hostile file."""
    return printable(" ".join(text.split()))


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, in ASCII for any terminal and locale; NaN and infinity become null."""
    typer.echo(json.dumps(plain(value), indent=1, allow_nan=False))


def print_table(table: Table) -> None:
    """Print a table with its texts as they are: a name like [bold] or :smile: is a name."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as a table; columns of numbers are right-aligned."""
    from loraweave.common.display import ShownTable

    cells = ([cell if isinstance(cell, int | float) else one_line(str(cell)) for cell in row] for row in rows)
    print_table(ShownTable.of(columns, cells))


def show_rows(as_json: bool, value: Any, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print the value as JSON on stdout if `as_json`, else the rows as a table."""
    if as_json:
        print_json(value)
    else:
        print_rows(columns, rows)


def note(text: str) -> None:
    """Print a line on stderr, for the person at the terminal, unless the command has --quiet."""
    if logging.getLogger("loraweave").isEnabledFor(logging.WARNING):
        say(text)


def say(text: str) -> None:
    """Print a line on stderr; a terminal gets it in lines of its width, broken at blanks that are not inside `code`."""
    text = one_line(text)
    if sys.stderr.isatty():
        kept = "`".join(part.replace(" ", "\0") if n % 2 else part for n, part in enumerate(text.split("`")))
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        text = textwrap.fill(kept, width, break_long_words=False, break_on_hyphens=False).replace("\0", " ")
    typer.echo(text, err=True)


def answer(as_json: bool, value: Any, *notes: str) -> None:
    """Print the value as JSON on stdout if `as_json`, else the notes on stderr, for a person."""
    if as_json:
        print_json(value)
    for text in () if as_json else notes:
        note(text)


def progress_to_stderr() -> None:
    """Send the progress bars of long calls, on rich's global console, to stderr, so that stdout has only results."""
    import rich

    rich.reconfigure(stderr=True)


def record_row(record: Record) -> dict[str, Any]:
    """Return a record without its card, as JSON types."""
    names = "name hash base_model rank target_modules license tags description size_bytes created language version restored"
    shown = {name: plain(getattr(record, name)) for name in (*names.split(), "base_revision")}
    return {**shown, "source": record.source and vars(record.source), "parents": plain(record.parents)}


def composition_row(stored: StoredComposition) -> dict[str, Any]:
    """Return a composition of a hub as JSON types; `chosen` names the row that a search chose."""
    row = {"name": stored.name, "created": stored.created, "hash": stored.hash, "formula": stored.formula}
    return {**row, "chosen": (stored.report or {}).get("chosen"), "size_bytes": sum(stored.files.values())}


def plain(value: Any) -> Any:
    """Convert a value to JSON types: NaN and infinity to None, and unknown types to text."""
    match value:
        case Mapping():
            return {str(key): plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case float():
            return value if math.isfinite(value) else None
        case None | str() | int():
            return value
    return str(value)


HubOption = Annotated[
    str, typer.Option("--hub", envvar="LORAWEAVE_HUB", metavar="PLACE", help="The hub: a folder, or postgresql://...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
AnomaliesOption = Annotated[
    str, typer.Option(metavar="POLICY", help="What looks wrong about an adapter: off, report, quarantine or refuse.")
]
AllowLicensesOption = Annotated[
    bool, typer.Option("--allow-licenses", help="Also where licenses are known to exclude each other, or derived works.")
]
BlobsOption = Annotated[
    str | None,
    typer.Option(envvar="LORAWEAVE_BLOBS", metavar="PLACE", help="Where a new hub keeps its files: a folder, or s3://..."),
]
DEFAULT_HUB = "adapters"
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model: a folder, GGUF file or hub id; the embedded one by default."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16, float16, or fast: bfloat16 where it is faster."),
]
OptionOption = Annotated[
    list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="A setting of the method; may be repeated.")
]
InstructionOption = Annotated[str | None, typer.Option(help="What the task asks for; from the rows when they agree on one.")]
SystemOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Ask in the base's chat template, after this turn of the system's, '' for none; rows of messages do so anyway.",
    ),
]
LabelsOption = Annotated[str | None, typer.Option(metavar="A,B", help="The only possible answers, separated by commas.")]
WorkersOption = Annotated[
    int | None, typer.Option(metavar="N", help="Spread the work over N processes; -1 for as many as there are cores.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
ManyTagsOption = Annotated[list[str] | None, typer.Option("--tag", help="A tag; may be given several times.")]
ExactRankOption = Annotated[int | None, typer.Option(min=1, help="Cut every layer to this rank; exact by default.")]
