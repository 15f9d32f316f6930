#!/usr/bin/env python3
"""Writes docs/registries.md: what the core has by name, from the first line of each file. Nothing of it is imported.

`scripts/pages.py` makes the tables of extensions with it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

from loraweave import registry

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "registries.md"
HEAD = """# What can be asked for by name

```python
import loraweave as lw

assert {"linear", "svd", "ties"} <= set(lw.names("methods"))
```

A folder is a registry: a file in it is an entry, its first line the description below. `scripts/tables.py` writes this page,
and a test compares it with the folders.

An extension, a folder of `extensions/`, adds files to a registry by a folder of the same name; the site lists
them by extension. Another package adds a file of its own by an entry point, and is then named, checked and saved like ours:

```toml
[project.entry-points."loraweave.methods"]
my_method = "my_package.my_method"
```

The groups are `loraweave.` with the names below, and `loraweave.recipes` for `experts`. A name is that of the file. Names of
ours cannot be taken; a file that cannot be imported raises `PluginFailed` when it is asked for, and only then. What such a
file is made from (`TokenRouter`, `Recipe`, `Solver`, kinds of options, `traits`) is in `loraweave.extend`.

Two groups are for what is no registry. An entry point `loraweave.commands` names a module with a `typer.Typer` called `app`,
whose commands stand beside ours in the shell, or one called `hub`, whose commands are those of `loraweave hub`. An entry
point NAME of `loraweave.pages` names a package that has the Markdown page NAME.md, which becomes a page of the site.
"""


def first_line(folder: str, name: str) -> str:
    """The first line of the entry's file, as a table cell."""
    path = ROOT.joinpath(*registry.modules(folder)[name].split(".")[1:]).with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def tables(packages: Callable[[str], bool], heading: str = "##") -> list[str]:
    """Return the table of each registry, of its files in the packages that count; a registry without one is left out."""
    parts = []
    for folder in registry.registries():
        places = {name: module.rpartition(".")[0] for name, module in sorted(registry.modules(folder).items())}
        places = {name: place for name, place in places.items() if packages(f"{place}.")}
        if places:
            kept = sorted(set(places.values()))
            shown = " and ".join(f"`{place.removeprefix('loraweave.').replace('.', '/')}/`" for place in kept)
            rows = [f"| `{name}` | {first_line(folder, name)} |" for name in places]
            head = [f"{heading} {folder}", f"Files of {shown}.", "", "| name | what it is |", "|---|---|"]
            parts.append("\n".join([*head, *rows, ""]))
    return parts


def of_core(package: str) -> bool:
    """Return True if a package, with a dot at its end, is the core's."""
    return package.startswith("loraweave.") and not package.startswith(f"{registry.EXTENSIONS}.")


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *tables(of_core)])


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(page(), end="")
    else:
        TARGET.write_text(page(), encoding="utf-8")
