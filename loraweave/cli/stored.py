"""`loraweave hub save-composition`, `compositions`, `write-composition` and `remove-composition`: compositions in a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraweave.cli._flags import DEFAULT_HUB, HubOption, JsonOption
from loraweave.cli._inputs import COMPOSITION_FILE, open_hub
from loraweave.cli._printing import answer, note, print_json, print_rows

SAVE_EXAMPLE = 'Example: loraweave hub save-composition careful "0.7*antonym - 0.3*negation"'
LIST_EXAMPLE = "Example: loraweave hub compositions --json"
WRITE_EXAMPLE = "Example: loraweave hub write-composition support-bot composed"
REMOVE_EXAMPLE = "Example: loraweave hub remove-composition support-bot"

NameArgument = Annotated[str, typer.Argument(help="A composition of the hub, without the @.")]


def save_composition(
    name: Annotated[str, typer.Argument(help="Its name; a formula says @NAME.")],
    composition: Annotated[
        str, typer.Argument(metavar="FOLDER|FORMULA", help="A folder of compose --out, or a formula such as 'a + 0.5*b'.")
    ],
    replace: Annotated[bool, typer.Option("--replace", help="In place of another composition of that name.")] = False,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Keep a composition in the hub, with its report, or a formula, whose adapters must be there."""
    import loraweave as lw

    with open_hub(hub) as opened:
        kept: Path | lw.Formula = Path(composition)
        if (Path(composition) / COMPOSITION_FILE).is_file():
            from loraweave.composer.compose.saved import SavedRecipe

            # a damaged folder is told now, not by who reads it
            SavedRecipe.read(composition)
        else:
            kept = lw.parse(composition)
            kept.adapters(opened)
        stored = opened.save_composition(name, kept, replace=replace)
    told = {"name": stored.name, "hash": stored.hash, "created": stored.created, "formula": stored.formula}
    answer(as_json, told, f"saved {stored.name!r}; formulas and `loraweave merge` know it as @{stored.name}")


def list_compositions(hub: HubOption = DEFAULT_HUB, as_json: JsonOption = False) -> None:
    """List the compositions that a hub keeps."""
    with open_hub(hub) as opened:
        found = [
            {
                "name": stored.name,
                "created": stored.created,
                "hash": stored.hash,
                "formula": stored.formula,
                "chosen": (stored.report or {}).get("chosen"),
                "size_bytes": sum(stored.files.values()),
            }
            for stored in opened.compositions()
        ]
    if as_json:
        print_json(found)
        return
    shown = [(row["name"], row["created"], row["formula"] or f"composed: {row['chosen']}") for row in found]
    print_rows(("name", "created", "what"), shown)


def write_composition(
    name: NameArgument,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where its folder goes; eval, explain and export read it.")],
    hub: HubOption = DEFAULT_HUB,
) -> None:
    """Write a stored composition as the folder that it was saved from."""
    with open_hub(hub) as opened:
        opened.composition(name).write(out)
    note(f"wrote {name!r} to {out}")


def remove_composition(name: NameArgument, hub: HubOption = DEFAULT_HUB) -> None:
    """Take a composition out of the hub; `gc` then frees its files."""
    with open_hub(hub) as opened:
        opened.remove_composition(name)
    note(f"removed {name!r}; `loraweave hub gc` frees its files")
