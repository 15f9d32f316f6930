#!/usr/bin/env python3
"""Writes docs/registries.md: what can be asked for by name, from the first line of each file. Nothing of it is imported."""

from __future__ import annotations

import ast
import sys
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

Another package adds a file of its own by an entry point, and is then named, checked and saved like ours:

```toml
[project.entry-points."loraweave.methods"]
my_method = "my_package.my_method"
```

The groups are `loraweave.` with the names below, and `loraweave.recipes` for `experts`. A name is that of the file. Names of
ours cannot be taken; a file that cannot be imported raises `PluginFailed` when it is asked for, and only then.
"""


def first_line(folder: str, name: str) -> str:
    """The first line of the entry's file, as a table cell."""
    path = ROOT.joinpath(*registry.modules(folder)[name].split(".")[1:]).with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def page() -> str:
    """The whole page; a folder without entries is left out."""
    parts = [HEAD]
    for folder in registry.FOLDERS:
        if names := registry.names(folder):
            places = {module.rpartition(".")[0] for module in registry.modules(folder).values()}
            shown = " and ".join(f"`{place.removeprefix('loraweave.').replace('.', '/')}/`" for place in sorted(places))
            rows = [f"| `{name}` | {first_line(folder, name)} |" for name in names]
            parts.append(
                "\n".join([f"## {folder}", f"Files of {shown}.", "", "| name | what it is |", "|---|---|", *rows, ""])
            )
    return "\n".join(parts)


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(page(), end="")
    else:
        TARGET.write_text(page(), encoding="utf-8")
