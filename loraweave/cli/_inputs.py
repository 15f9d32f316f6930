"""Readers of the arguments of commands: rows of examples, weights, options, and adapters from folders or a hub."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from loraweave import registry
from loraweave.cli._application import note
from loraweave.common.chat import Prompt
from loraweave.common.files import read_yaml
from loraweave.common.options import require_known
from loraweave.common.rows import Row, located, located_lines, read_row, shared_instruction
from loraweave.errors import AdapterExists, AdapterNotFound, HubError, InvalidTask, ScopeError, WeightingError
from loraweave.hub.stores.open_stores import hub_exists
from loraweave.types import Task

if TYPE_CHECKING:
    import loraweave as lw

ADAPTER_FILE = "adapter_config.json"
COMPOSITION_FILE = "composition.json"
STDIN = Path("-")
FORMULA_KEYS = ("formula", "hub", "pool", "rank", "heads")
DTYPES = ("float32", "bfloat16", "float16", "fast")


@dataclass(frozen=True)
class Rows:
    """The rows of a file of examples; no rows for a task that only has an instruction."""

    rows: tuple[Row, ...]

    def examples(self) -> list[tuple[Prompt, str]]:
        """Return (input, first accepted target) of every row."""
        return [(row.asked, row.targets[0]) for row in self.rows]

    def accepted(self) -> list[tuple[Prompt, list[str]]]:
        """Return (input, accepted targets) of every row."""
        return [(row.asked, list(row.targets)) for row in self.rows]

    def task(self, instruction: str | None, system: str | None, *, labels: Sequence[str] | None = None) -> Task:
        """Make a task of all rows; a `system` turn, even an empty one, makes it a chat.

        Raises InvalidTask if no instruction is passed and those of the rows differ.
        """
        if instruction is None:
            instruction = shared_instruction([row for row in self.rows if row.chat is None])
        chat: dict[str, Any] = {} if system is None else {"chat": True, "system": system}
        return Task(self.examples(), instruction=instruction, labels=labels, **chat)


def read_rows(path: Path, *, split: str, most: int | None = None) -> Rows:
    """Read a .jsonl or .csv file, or stdin for `-`, without the rows whose field "split" differs from `split`.

    Of the others at most the first `most` are returned. If rows are left out, a note says how many stay. Raises InvalidTask,
    with the file and line, for a row that cannot be read, and if no row is left.
    """
    located_rows = _of_stdin() if path == STDIN else located(path, one_split=False)
    read = [read_row(row, where, targets="several") for where, row in located_rows]
    if not read:
        raise InvalidTask(f'{path} has no rows; it needs lines such as {{"input": "...", "target": "..."}}')
    kept = [row for row in read if row.split in ("", split)]
    if not kept:
        splits = sorted({row.split for row in read})
        raise InvalidTask(f"{path} has no rows of split {split!r}; its splits are {', '.join(splits)}: pass --split")
    used = kept[:most]
    if len(used) < len(read):
        which = f"the first {len(used)} of {len(kept)} rows" if len(used) < len(kept) else f"{len(kept)} rows"
        note(f"{path.name}: {which}" + (f" of split {split!r}, out of {len(read)}" if len(kept) < len(read) else ""))
    return Rows(tuple(used))


def _of_stdin() -> Iterator[tuple[str, Any]]:
    """Yield (place, raw row): lines of JSON from a pipe, or pairs typed at a terminal until an empty input."""
    if is_terminal():
        note("give examples of the task, one at a time; an empty input ends them")
        while text := typer.prompt("input", default="", show_default=False, err=True):
            yield "what was typed", (text, typer.prompt("target", err=True))
        return
    yield from located_lines(sys.stdin, "stdin")


def is_terminal() -> bool:
    """Return True if stdin is a terminal, at which a person types, and not a pipe or a file."""
    return sys.stdin.isatty()


def read_weights(text: str | None, sources: Sequence[str]) -> list[float]:
    """Return one weight for each of `sources` from comma-separated numbers; without a text, equal weights that sum to 1."""
    count = len(sources)
    if text is None:
        return [1 / count] * count
    parts = text.split(",")
    # the shell splits at blanks, so that numbers after a blank arrive as names of adapters
    stray = [source for source in sources if _is_number(source)]
    if stray and len(parts) != count:
        whole = ",".join([*filter(None, parts), *stray])
        raise typer.BadParameter(f"--weights takes numbers separated by commas, without blanks: --weights {whole}")
    weights = [_number(part, "--weights") for part in parts]
    if len(weights) != count:
        raise typer.BadParameter(f"--weights has {len(weights)} numbers for {count} adapters; give one for each")
    return weights


def read_options(given: Sequence[str], *, reserved: Sequence[str] = ()) -> dict[str, Any]:
    """Parse NAME=VALUE pairs, each value as JSON if possible, else as text. `reserved` names are refused: flags set them."""
    options: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--option takes NAME=VALUE, not {pair!r}")
        if name in reserved:
            raise typer.BadParameter(f"--option {name}=... is not for --option: see --help for its own flag")
        if name in options:
            raise typer.BadParameter(f"--option {name} is given twice")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def read_named_weights(given: Sequence[str]) -> dict[str, float]:
    """Parse NAME=NUMBER pairs, split at the last equals sign, since the name of an adapter may contain others."""
    weights: dict[str, float] = {}
    for pair in given:
        name, equals, value = pair.rpartition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--weight takes NAME=NUMBER, not {pair!r}")
        if name in weights:
            raise typer.BadParameter(f"--weight {name!r} is given twice")
        weights[name] = _number(value, "--weight")
    return weights


def read_labels(text: str | None) -> list[str] | None:
    """Split a text of labels at its commas; return None for None."""
    if text is None:
        return None
    labels = [label.strip() for label in text.split(",")]
    if not all(labels) or len(set(labels)) < max(2, len(labels)):
        raise typer.BadParameter(f"--labels takes two or more different labels, separated by commas, not {text!r}")
    return labels


def open_hub(place: str) -> lw.Hub:
    """Open the hub in a folder or at a URL. Never creates one: raises HubError if there is none."""
    import loraweave as lw

    if not hub_exists(place):
        raise HubError(
            f"no hub in {place!r}; `loraweave hub add FOLDER --hub {place}` makes one, --hub or LORAWEAVE_HUB names another"
        )
    # a hub in a folder has recorded where its blobs are; a hub on PostgreSQL has so if they are at a URL
    return lw.Hub(place, blobs=os.environ.get("LORAWEAVE_BLOBS") if "://" in place else None)


def read_adapter(source: str, hub: str) -> lw.Adapter:
    """Open the adapter in the folder `source`, or the hub's adapter of that name. Raises BadParameter if both exist."""
    import loraweave as lw

    has_hub = hub_exists(hub)
    if not Path(source).is_dir():
        if not has_hub:
            raise AdapterNotFound(f"no folder {source!r}, and no hub in {hub!r} to have an adapter of that name")
        with open_hub(hub) as opened:
            return opened[source]
    if has_hub:
        with open_hub(hub) as opened:
            if source in opened:
                raise typer.BadParameter(
                    f"{source!r} is a folder, and in {opened} an adapter; write ./{source} for the folder"
                )
    return lw.Adapter.from_pretrained(Path(source))


def read_formula(sources: Sequence[str], hub: str) -> lw.Formula | None:
    """Parse a single source as a formula; return None for a folder, a name in the hub, several sources, or without a hub."""
    import loraweave as lw

    if len(sources) != 1 or Path(sources[0]).is_dir() or not hub_exists(hub):
        return None
    with open_hub(hub) as opened:
        return None if sources[0] in opened else lw.parse(sources[0])


def is_recipe(sources: Sequence[str]) -> bool:
    """Return True if `sources` is a single YAML file that exists."""
    return len(sources) == 1 and sources[0].lower().endswith((".yaml", ".yml")) and Path(sources[0]).is_file()


def merge_recipe(path: Path, hub: str, seed: int, rules: Mapping[str, Any]) -> tuple[lw.Adapter, str]:
    """Merge adapters by the recipe in a YAML file; return the merged adapter, and the name of the dtype to save it in.

    `rules`, from flags, take precedence over the recipe's keys. A formula names adapters of the recipe's `pool` or `hub`,
    else of `hub`. A recipe that an extension reads names folders beside the file, or adapters of `hub`.
    """
    import loraweave as lw

    recipe = read_merge_file(path)
    if not isinstance(recipe, Mapping):

        def adapter(name: str) -> lw.Adapter:
            beside = path.parent / name
            return read_adapter(str(beside) if beside.is_dir() else name, hub)

        return recipe.merge(adapter, seed=seed, **rules), recipe.dtype
    overrides: dict[str, Any] = {
        key: recipe[key] for key in ("rank", "heads") if key in recipe and rules[key] in (None, "error")
    }
    chosen = {**rules, **overrides}
    formula = lw.parse(recipe["formula"])
    if "pool" in recipe:
        return formula.merge(read_pool(path.parent / recipe["pool"]), **chosen), "float32"
    place = recipe.get("hub", hub)
    with open_hub(place if "://" in place or "hub" not in recipe else str(path.parent / place)) as opened:
        return formula.merge(opened, **chosen), "float32"


def read_merge_file(path: Path) -> Any:
    """Return a YAML file's mapping if it has a formula, else the recipe that an extension's `merge_files` reads from it.

    Such a recipe has `merge(find, seed=, **rules)`, which returns the merged adapter and calls `find(name)` for each parent,
    and the `dtype` to save it in. Raises WeightingError for a file that no extension reads.
    """
    said = read_yaml(path, WeightingError)
    if "formula" not in said:
        readers = list(registry.bringing("merge_files"))
        recipe = next((recipe for reader in readers if (recipe := reader.read(path, said)) is not None), None)
        if recipe is None:
            kinds = ", or ".join(["a 'formula'", *(reader.READS for reader in readers)])
            raise WeightingError(f"{path} has {', '.join(said)}; a recipe has {kinds}")
        return recipe
    require_known(str(path), said, FORMULA_KEYS, noun="key")
    if not all(isinstance(said.get(key, ""), str) for key in ("formula", "hub", "pool", "heads")):
        raise WeightingError(f"{path}: formula, hub, pool and heads are texts")
    if "hub" in said and "pool" in said:
        raise WeightingError(f"{path} has a hub and a pool; leave one out")
    return said


def read_pool(folder: Path) -> lw.ExpertPool:
    """Open all adapter folders directly in `folder`, in order of their names. Raises WeightingError if there is none."""
    import loraweave as lw
    from loraweave.hub.sources import adapter_folders

    folders = adapter_folders(folder)
    if not folders:
        raise WeightingError(f"{folder} has no adapter folders (with {ADAPTER_FILE}) in it; `loraweave train` makes some")
    return lw.ExpertPool([lw.Adapter.from_pretrained(path) for path in folders])


def load_model(base: str | None, dtype: str | None = None) -> tuple[Any, Any]:
    """Load (model, tokenizer) of a base model; a progress bar shows on terminals only, not in logs and pipes."""
    require_dtype(dtype)
    import loraweave as lw
    from loraweave.hub.base import fast_dtype

    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    loaded: tuple[Any, Any] = lw.load_base(base, dtype=fast_dtype() if dtype == "fast" else dtype)
    return loaded


def require_dtype(dtype: str | None) -> None:
    """Raise BadParameter unless a --dtype is None or a name that `load_model` takes."""
    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"--dtype takes {', '.join(DTYPES)}, not {dtype!r}")


def is_given(context: typer.Context, name: str) -> bool:
    """Return True if an option was written in the command, rather than left to its default or the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def require_free(folder: Path, *own: str, replace: bool = True) -> None:
    """Raise AdapterExists unless `folder` is missing, empty, or an earlier result, which has one of the files `own`.

    With replace=False an earlier result raises, too: only --force would overwrite it. Meant to be called before long work.
    """
    earlier = any((folder / file).is_file() for file in own)
    if folder.exists() and not (folder.is_dir() and (earlier or not any(folder.iterdir()))):
        raise AdapterExists(f"{folder} is a file, or holds something that has no {own[0]}; name another folder with --out")
    if earlier and not replace:
        raise AdapterExists(f"{folder} holds an adapter already; pass --force to write over it, or another folder to --out")


def recorded_base(folder: Path) -> str | None:
    """Return the base model that a composition folder names, or None. Raises AdapterNotFound if it holds no composition."""
    from loraweave.composer.compose.report import SavedRecipe

    return SavedRecipe.read(folder).base_model or None


def require_one_adapter(folder: Path, command: str, *rest: str) -> None:
    """Raise ScopeError if the composition in `folder` is an average or a program of several parts, and not one adapter.

    For every part that is one adapter, the message has a command line of `command`, the part's folder and `rest`.
    """
    from loraweave.composer.compose.report import SavedRecipe

    recipe = SavedRecipe.read(folder)
    if recipe.parts is None:
        return
    what, apart = ("the average of", "answer apart") if recipe.parts == "members" else ("the program", "answer in turn")
    parts = {name: folder / f"member-{number}" for number, name in enumerate(recipe.part_names)}
    commands = [
        f"`{shlex.join(['loraweave', command, str(path), *rest])}` takes {name}"
        for name, path in parts.items()
        if SavedRecipe.read(path).parts is None
    ]
    named = " and ".join(parts) if recipe.parts == "members" else " > ".join(parts)
    raise ScopeError(
        f"{str(folder)!r} is {what} {named}, whose {recipe.parts} {apart}, so one adapter cannot replace it: "
        + ", ".join(commands)
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{flag}: {text!r} is not a number") from None
    if not math.isfinite(value):
        raise typer.BadParameter(f"{flag}: {text!r} is not finite")
    return value
