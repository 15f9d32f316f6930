"""Limits on files, lines and names, which only go down: `python tests/test_budgets.py` prints today's numbers beside them.

Below a limit, lower it: `python tests/test_budgets.py --lower` writes the numbers that are below theirs into this file.
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from import_statements import AT_ROOT, MODULES, ROOT, parsed

import loraweave as lw
from loraweave import errors, extend, registry

LIMITS = {
    "files of the core": 240,
    "lines of the core": 45_923,
    "lines of the product": 83_826,
    "lines of the largest extension": 4_000,
    "loose files of composer/": 0,
    "public names but errors": 31,
    "names of loraweave.extend itself": 60,
    "names of the largest kit": 56,
    "names for those who extend": 469,
    "imports below loraweave. in the pages": 0,
    "values named found, own, each, given or asked": 8,
    "docstrings that are no order": 0,
}
# a limit that stays: an extension is small enough to be read
FIXED = {"lines of the largest extension"}
# what any other limit may be above its number before it has to be lowered
SLACK = 0.05
VAGUE = {"found", "own", "each", "given", "asked"}
IMPORTED = re.compile(r"^\s*(?:from|import) (loraweave\.[\w.]+)", re.MULTILINE)
PUBLIC = re.compile(rf"loraweave\.extend(\.\w+)?|{re.escape(registry.EXTENSIONS)}\.\w+")


def is_extension(module):
    return module.startswith(f"{registry.EXTENSIONS}.")


@cache
def lines(path):
    return path.read_bytes().count(b"\n")


def lines_by_extension():
    sums = dict.fromkeys(registry.extensions(), 0)
    for module, path in MODULES.items():
        if is_extension(module):
            sums[module.split(".")[2]] += lines(path)
    return sums


@cache
def names_by_kit():
    """{kit of `loraweave.extend`: its names}."""
    kits = [kit.name for kit in pkgutil.iter_modules(extend.__path__)]
    return {kit: importlib.import_module(f"loraweave.extend.{kit}").__all__ for kit in kits}


def deep_imports(text):
    """Return the modules below `loraweave.` that a page imports and that are neither public nor an extension."""
    return [name for name in IMPORTED.findall(text) if not PUBLIC.fullmatch(name)]


def vague_values():
    nodes = (node for path in MODULES.values() for node in ast.walk(parsed(path)))
    return sum(isinstance(node, ast.Name) and node.id in VAGUE and isinstance(node.ctx, ast.Store) for node in nodes)


def no_orders():
    """How many docstrings ruff finds whose first line is not in the imperative mood; None without ruff."""
    if (ruff := shutil.which("ruff", path=str(Path(sys.executable).parent))) is None:
        return None
    words = [ruff, "check", "--isolated", "--no-cache", "--select", "D401", "--output-format", "json", "loraweave", *AT_ROOT]
    return len(json.loads(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout))


MEASURES = {
    "files of the core": lambda: sum(not is_extension(module) for module in MODULES),
    "lines of the core": lambda: sum(lines(path) for module, path in MODULES.items() if not is_extension(module)),
    "lines of the product": lambda: sum(map(lines, MODULES.values())),
    "lines of the largest extension": lambda: max(lines_by_extension().values(), default=0),
    "loose files of composer/": lambda: len(
        {path.name for path in (ROOT / "composer").glob("*.py")} - {"__init__.py", "composer.py"}
    ),
    "public names but errors": lambda: len(set(lw.__all__) - set(vars(errors))),
    "names of loraweave.extend itself": lambda: len(extend.__all__),
    "names of the largest kit": lambda: max(map(len, names_by_kit().values())),
    "names for those who extend": lambda: len(extend.__all__) + sum(map(len, names_by_kit().values())),
    "imports below loraweave. in the pages": lambda: sum(
        len(deep_imports(path.read_text(encoding="utf-8"))) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    ),
    "values named found, own, each, given or asked": vague_values,
    "docstrings that are no order": no_orders,
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_number_is_within_its_limit_and_the_limit_is_lowered_with_it(what):
    number, limit = MEASURES[what](), LIMITS[what]
    if number is None:
        pytest.skip("ruff is not installed")
    assert number <= limit, f"{what}: {number}, and the limit is {limit}"
    if what not in FIXED:
        way_out = f"{what}: {number} is well below {limit}: lower it by `python tests/test_budgets.py --lower`"
        assert limit - number <= max(5, SLACK * limit), way_out


def test_an_import_of_a_page_is_deep_unless_it_is_of_a_public_name_or_an_extension():
    public = ["import loraweave as lw", "from loraweave.extend import get", "from loraweave.extend.live import Kernel"]
    public.append(f"from {registry.EXTENSIONS}.verify import ask")
    deep = {"loraweave.hub.hub": "from", "loraweave.types": "import", f"{registry.EXTENSIONS}.verify.report": "    from"}
    assert deep_imports("\n".join([*public, *(f"{word} {name} import X" for name, word in deep.items())])) == list(deep)


if __name__ == "__main__":
    text = Path(__file__).read_text(encoding="utf-8")
    for what, limit in LIMITS.items():
        number = MEASURES[what]()
        print(f"{what:48s} {number} of {limit}")
        if "--lower" in sys.argv and number is not None and number < limit and what not in FIXED:
            text = re.sub(rf'("{re.escape(what)}": )[\d_]+', rf"\g<1>{number:_}", text)
    Path(__file__).write_text(text, encoding="utf-8")
