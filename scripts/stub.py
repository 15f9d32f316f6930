"""Writes loraweave/extend.pyi, where type checkers read the names that loraweave/extend.py loads on first use.

python scripts/stub.py              writes it
python scripts/stub.py --stale      says whether it has to be written
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraweave import extend

TARGET = Path(__file__).parents[1] / "loraweave" / "extend.pyi"


def stub() -> str:
    """Return the text of the file: every name imported as itself, which is how a stub passes a name on."""
    places = {"loraweave.common.lazy": "lazy"} | {f"loraweave.{module}": names for module, names in extend._MODULES.items()}
    lines = (f"from {module} import {name} as {name}" for module, names in places.items() for name in names.split())
    return "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--stale"]:
        if TARGET.read_text(encoding="utf-8") != stub():
            print(TARGET.name)
    else:
        TARGET.write_text(stub(), encoding="utf-8")
