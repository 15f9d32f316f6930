"""Reads the imports of every module: rooms import upstream only, absolutely, without cycles, and only what is declared."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from import_statements import AT_ROOT, MODULES, ROOMS, ROOT, imported, parsed, statements

from loraweave.registry import FOLDERS

FLOORS = ("errors", "registry", "common", "types", "lowrank", *ROOMS)


# those of the hub: folders, and files of its root; a file of one floor may import another of the same
HUB_FLOORS = (
    {"base", "base_layer", "base_reference", "gguf_base", "licenses"},
    {"formats"},
    {"sources"},
    {"adapter", "conversion", "merge_report", "pool"},
    {"compositions", "listing", "stores", "tables"},
    {"adding"},
    {"embedders", "indexes", "search"},
    {"hub"},
)


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


def test_a_floor_of_the_hub_imports_only_itself_and_what_is_below_it():
    number = {name: floor for floor, names in enumerate(HUB_FLOORS) for name in names}
    inside = {module: number[module.split(".")[2]] for module in MODULES if module.startswith("loraweave.hub.")}
    assert set(number) == {module.split(".")[2] for module in inside}
    assert {(module, name) for module in inside for name in ours(module) if inside.get(name, 0) > inside[module]} == set()


def test_imports_are_absolute_and_never_load_a_room_as_a_top_level_package():
    # of tests, examples and benchmarks ruff says so
    wrong = []
    for path in MODULES.values():
        relative = [node.lineno for node, *_ in statements(path) if isinstance(node, ast.ImportFrom) and node.level]
        bare = {name.split(".")[0] for name in imported(path)} & set(AT_ROOT)
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
    undeclared, of_ours = set(), {"loraweave", *AT_ROOT}
    for name, path in MODULES.items():
        for package in {module.split(".")[0] for module in imported(path)} - of_ours - set(sys.stdlib_module_names):
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
