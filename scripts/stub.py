"""Writes the stubs of loraweave: where type checkers read the names that a module of `STUBS` loads on first use.

python scripts/stub.py              writes them
python scripts/stub.py --stale      says which has to be written
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

from loraweave import extend, registry

ROOT = Path(__file__).parents[1]
KITS = [f"loraweave.extend.{kit.name}" for kit in pkgutil.iter_modules(extend.__path__)]
PACKAGES = {name: f"{registry.EXTENSIONS}.{name}" for name in registry.extensions() if (ROOT / "extensions" / name).is_dir()}
# {stub: (its module, the package below which its names are, what else it has)}
STUBS = {
    "loraweave/__init__.pyi": ("loraweave", "loraweave", "__version__: str\n"),
    "loraweave/extend/__init__.pyi": ("loraweave.extend", "loraweave", ""),
    **{f"{kit.replace('.', '/')}.pyi": (kit, "loraweave", "") for kit in KITS},
    **{f"extensions/{name}/__init__.pyi": (package, package, "") for name, package in PACKAGES.items()},
}


def stub(module: str, below: str, more: str) -> str:
    """Return the text of a module's stub: every name imported as itself, which is how a stub passes a name on."""
    held = importlib.import_module(module)._MODULES
    lines = (f"from {below}.{place} import {name} as {name}" for place, names in held.items() for name in names.split())
    return "\n".join(sorted(lines)) + "\n" + more


if __name__ == "__main__":
    for file, parts in STUBS.items():
        target = ROOT / file
        if sys.argv[1:] != ["--stale"]:
            target.write_text(stub(*parts), encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != stub(*parts):
            print(file)
