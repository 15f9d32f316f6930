"""Writes the stubs of loraweave: where type checkers read the names that a module of `STUBS` loads on first use.

python scripts/stub.py              writes them
python scripts/stub.py --stale      says which has to be written
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import loraweave
from loraweave import extend

FOLDER = Path(__file__).parents[1] / "loraweave"
KITS = [kit.name for kit in pkgutil.iter_modules(extend.__path__)]
# {stub: (its names by module, what else it has)}
STUBS = {
    "__init__.pyi": (loraweave._MODULES, "__version__: str\n"),
    "extend/__init__.pyi": (extend._MODULES, ""),
    **{f"extend/{kit}.pyi": (importlib.import_module(f"loraweave.extend.{kit}")._MODULES, "") for kit in KITS},
}


def stub(modules: dict[str, str], more: str) -> str:
    """Return the text of a stub: every name imported as itself, which is how a stub passes a name on."""
    lines = (
        f"from loraweave.{module} import {name} as {name}" for module, names in modules.items() for name in names.split()
    )
    return "\n".join(sorted(lines)) + "\n" + more


if __name__ == "__main__":
    for file, parts in STUBS.items():
        target = FOLDER / file
        if sys.argv[1:] != ["--stale"]:
            target.write_text(stub(*parts), encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != stub(*parts):
            print(file)
