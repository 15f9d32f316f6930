"""Runs the blocks of pages, and writes below each block what it shows: `python scripts/shown.py README.md docs/howto/*.md`.

A block of Python shows what it prints and, as in a notebook, the value of its last line, if that is an expression and
neither None nor a path; a block of the shell shows what it prints. This stands in a block `output` right below. The blocks
of a page run in their order, in a folder where only the examples are. Blocks that install packages are left out.
"""

from __future__ import annotations

import ast
import contextlib
import io
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTH, WIDE = 100, 120  # characters of a line of a table, and of any line
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:\n```output\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
MEASURED = re.compile(r"[\d.,]+(?= (?:s|ms|GB|MB|tokens a second)\b)")


def run(page: Path, names: dict[str, Any]) -> Iterator[tuple[re.Match[str], str]]:
    """Run the blocks of a page in the working folder; after each, yield its match and what it shows. Fills `names`."""
    seed()
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, code = block[1], block[2]
        if "pip install" not in code:
            text = shown_by_python(code, str(page), names) if language == "python" else shown_by_shell(code)
            # without the log of a server, which names a port
            told = [line.replace(f"{Path.cwd()}{os.sep}", "") for line in text.splitlines() if not line.startswith("INFO: ")]
            lines = [part for line in "\n".join(told).strip("\n").splitlines() for part in folded(line)]
            yield block, "".join(f"{line}\n" for line in lines)


def folded(line: str) -> list[str]:
    """Return the line in parts of at most WIDE characters, broken at blanks, without blanks at its end."""
    if len(line) <= WIDE:
        return [line.rstrip()]
    return textwrap.wrap(line, WIDE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def seed() -> None:
    """Seed the random generators that a page may draw from."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def shown_by_python(code: str, name: str, names: dict[str, Any]) -> str:
    """Execute a block of Python, and return what it prints followed by the `repr` of its last expression."""
    tree = ast.parse(code)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), names)
        value = None if last is None else eval(compile(last, name, "eval"), names)
        if not (value is None or isinstance(value, os.PathLike)):
            print(repr(value))
    return printed.getvalue()


def shown_by_shell(code: str) -> str:
    """Execute a block of the shell with this Python's commands, and return what it prints."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = ["bash", "-euo", "pipefail", "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}).stdout


def is_current(written: str, shown: str) -> bool:
    """True if what is written agrees with what was shown: words exactly, figures to a tenth, times and memory not at all."""
    first, second = comparable(written), comparable(shown)
    pairs = zip(FIGURE.findall(first), FIGURE.findall(second), strict=False)
    near = all(math.isclose(float(one), float(other), rel_tol=0.1, abs_tol=0.02) for one, other in pairs)
    return near and FIGURE.sub("0.0", first) == FIGURE.sub("0.0", second)


def comparable(text: str) -> str:
    """The text without borders of tables, widths of columns, and the columns of seconds."""
    lines = text.splitlines()
    timed = {n for line in lines for n, cell in enumerate(line.split("┃")) if cell.strip() == "seconds"}
    rows = [[cell for n, cell in enumerate(re.split("[│┃]", line)) if n == 0 or n not in timed] for line in lines]
    joined = re.sub(r"[\s\u2500-\u257f]+", " ", " ".join(cell for row in rows for cell in row)).strip()
    # a process that used more memory earlier measures no peak
    return MEASURED.sub("0", joined).replace(", 0 GB measured", "")


def rewrite(page: Path) -> None:
    """Run a page in a folder made for it, and write what its blocks show below them where that is no longer current."""
    parts, end, text = [], 0, page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("examples").symlink_to(ROOT / "examples")
        for block, shown in run(page, {}):
            kept = block[3] if is_current(block[3] or "", shown) else shown
            output = f"\n```output\n{kept}```\n" if kept else ""
            parts += [text[end : block.start()], f"```{block[1]}\n{block[2]}```\n{output}"]
            end = block.end()
    page.write_text("".join(parts) + text[end:], encoding="utf-8")


if __name__ == "__main__":
    os.environ["COLUMNS"] = str(WIDTH)
    os.environ.pop("LORAWEAVE_HUB", None)
    for path in map(Path, sys.argv[1:]):
        rewrite(path.resolve())
