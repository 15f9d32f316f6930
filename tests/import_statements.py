"""The modules that are installed, by their files, and what each of them imports; nothing is imported to know it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# upstream first
ROOMS = ("hub", "retrieval", "routers", "composer", "serving")
AT_ROOT = (*ROOMS, "extensions")


def sources():
    """{dotted module name: path} of everything that is installed."""
    modules = {}
    for path in (ROOT / "loraweave").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        # links in loraweave/ show the rooms to type checkers
        if parts[1] not in AT_ROOT:
            modules[".".join(parts)] = path
    for room in AT_ROOT:
        for path in (ROOT / room).rglob("*.py"):
            modules[".".join(("loraweave", *path.relative_to(ROOT).with_suffix("").parts))] = path
    return {name.removesuffix(".__init__"): path for name, path in modules.items()}


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def only_for_types(node):
    return isinstance(node, ast.If) and getattr(node.test, "attr", getattr(node.test, "id", "")) == "TYPE_CHECKING"


@cache
def statements(path):
    """Every import statement of a file, whether only a type checker sees it, and whether only a call runs it."""
    found, waiting = [], [(parsed(path), False, False)]
    while waiting:
        node, typed, called = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append((node, typed, called))
        elif not isinstance(node, ast.expr):
            typed |= only_for_types(node)
            called |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            waiting += [(child, typed, called) for child in ast.iter_child_nodes(node)]
    return found


def imported(path, modules=(), *, at_run_time=False, inside_functions=True):
    """The dotted names of the modules that a file imports; `from a import b` is a.b where that is a module of ours."""
    found = set()
    for node, typed, called in statements(path):
        if (at_run_time and typed) or (called and not inside_functions):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                # what is taken out of the door itself names the door, whatever it is
                found |= {node.module} if inner not in modules else {inner, *({"loraweave"} & {node.module})}
    return found


MODULES = sources()
