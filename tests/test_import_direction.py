"""Reads the imports of every module: rooms import upstream only, absolutely, without cycles, and only what is declared."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from loraweave.registry import FOLDERS

ROOT = Path(__file__).parents[1]
# upstream first
ROOMS = ("hub", "retrieval", "routers", "composer", "serving")
FLOORS = ("errors", "registry", "common", "types", "lowrank", *ROOMS)
OURS = ("loraweave", *ROOMS)


def sources():
    """{dotted module name: path} of everything that is installed."""
    found = {}
    for path in (ROOT / "loraweave").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        # links in loraweave/ show the rooms to type checkers
        if parts[1] not in ROOMS:
            found[".".join(parts)] = path
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found[".".join(("loraweave", *path.relative_to(ROOT).with_suffix("").parts))] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


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


def ours(module):
    return {name for name in imported(MODULES[module], MODULES) if name.split(".")[0] == "loraweave"}


def test_the_modules_are_found():
    assert {"loraweave", "loraweave.types", "loraweave.hub.hub", "loraweave.composer.merge.methods.linear"} <= set(MODULES)


def test_a_floor_imports_only_itself_and_what_is_below_it():
    wrong = set()
    for module in MODULES:
        floor = module.split(".")[1] if "." in module else ""
        if floor in FLOORS:
            allowed = FLOORS[: FLOORS.index(floor) + 1]
            wrong |= {(module, name) for name in ours(module) if name == "loraweave" or name.split(".")[1] not in allowed}
    assert wrong == set()


def test_imports_are_absolute_and_never_load_a_room_as_a_top_level_package():
    # of tests, examples and benchmarks ruff says so
    wrong = []
    for path in MODULES.values():
        relative = [node.lineno for node, *_ in statements(path) if isinstance(node, ast.ImportFrom) and node.level]
        bare = {name.split(".")[0] for name in imported(path)} & set(ROOMS)
        if relative or bare:
            wrong.append((path, relative, bare))
    assert wrong == []


def test_no_module_imports_itself_through_others_not_even_for_types_or_in_a_function():
    graph = {name: imported(path, MODULES) & set(MODULES) - {name} for name, path in MODULES.items()}
    # raises CycleError, which names the cycle
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_a_floor_asks_only_the_registries_of_itself_and_of_what_is_below_it():
    wrong = set()
    for module, path in MODULES.items():
        floor = module.split(".")[1] if "." in module else ""
        if floor not in ROOMS or "registry." not in path.read_text(encoding="utf-8"):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("registry.get", "registry.names") and node.args:
                folder = getattr(node.args[0], "value", None)
                floors = {package.split(".")[1] for package in FOLDERS.get(folder, ())}
                wrong |= {(module, folder) for above in floors if ROOMS.index(above) > ROOMS.index(floor)}
    assert wrong == set()


def test_every_third_party_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [line for part in (project["dependencies"], *project["optional-dependencies"].values()) for line in part]
    normal = {re.split(r"[\s\[<>=!~;]", line)[0].lower().replace("_", "-") for line in declared}
    distributions = packages_distributions()
    undeclared = set()
    for name, path in MODULES.items():
        for package in {module.split(".")[0] for module in imported(path)} - set(OURS) - set(sys.stdlib_module_names):
            owners = {owner.lower().replace("_", "-") for owner in distributions.get(package, [package])}
            if not owners & normal:
                undeclared.add((name, package))
    assert undeclared == set()


def test_torch_is_not_needed_to_import_the_front_door_or_the_hub():
    # the tree, not the machine: tests/test_public_api.py looks at what a process really loads
    for module in (
        "loraweave",
        "loraweave.types",
        "loraweave.registry",
        "loraweave.hub.hub",
        "loraweave.hub.stores.catalogue",
    ):
        assert "torch" not in imported(MODULES[module], at_run_time=True, inside_functions=False)
