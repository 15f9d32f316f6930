#!/usr/bin/env python3
"""Count the faults that tests find: change one place of the code at a time, and run the tests.

    pip install mutmut
    python scripts/mutants.py loraweave/lowrank tests/lowrank --sample 50 --seed 0

Paths below tests are the tests, the others the code. The changes are mutmut's, except for None in place of a value, which
fails wherever it runs; annotations, imports, docstrings and what is raised stay as they are. All happens in a copy of the
checkout, each mutant in a fork that has imported torch, the tests of the file's namesake first, up to the first failure. A
mutant that survives is printed: a test is missing, or the mutant says the same in other words (docs/mutation.md).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

try:
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.mutators import mutation_operators
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install mutmut")

OPTIONS = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
OPTIONS += ["-m", "not slow and not gpu and not faults_long"]


class Places(cst.CSTVisitor):
    """Collects the changes of each place of a file, as (line, operator, old node, new node)."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.changes = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        match node:
            case cst.Annotation() | cst.Raise() | cst.Import() | cst.ImportFrom() | cst.If(test=cst.Name("TYPE_CHECKING")):
                return False
            case cst.FunctionDef(name=cst.Name("__repr__")) | cst.Call(func=cst.Attribute(attr=cst.Name("warn"))):
                return False
        if (place := self.get_metadata(PositionProvider, node, None)) is not None:
            chosen = [operator for kind, operator in mutation_operators if isinstance(node, kind)]
            changes = [(operator, node, new) for operator in chosen for new in operator(node)]
            changes = [(place.start.line, *change) for change in changes if not puts_none(*change)]
            self.changes += [changes] if changes else []
        return True


def puts_none(operator: object, node: cst.CSTNode, new: cst.CSTNode) -> bool:
    """True if the change gives a name, or passes to a call, None instead of a value."""
    name = operator.__name__
    return name == "operator_assignment" or (name == "operator_arg_removal" and len(node.args) == len(new.args))


class Outcome:
    """A pytest plugin that runs the tests of one name first, and saves whether all pass."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.name not in item.path.stem)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.file.write_text("timed out" if "Timeout (>" in report.longreprtext else "killed")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self.file.exists():
            self.file.write_text("survived" if exitstatus == 0 else "killed")


def fate(name: str, tests: list[str], seconds: float) -> str:
    """Return what becomes of the code as it is now: the tests run in a fork, which is ended after `seconds`."""
    file = Path("outcome").absolute()
    file.unlink(missing_ok=True)
    if (child := os.fork()) == 0:
        os.setsid()
        os.dup2(null := os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(null, 2)
        try:
            pytest.main([*OPTIONS, f"--timeout={seconds / 2:.0f}", *tests], plugins=[Outcome(name, file)])
        finally:
            os._exit(0)
    end = time.monotonic() + seconds
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    return file.read_text() if file.exists() else "timed out"


def measure(code: list[str], tests: list[str], sample: int, seed: int) -> None:
    """Print what becomes of each mutant, and the table of all."""
    start = time.monotonic()
    if fate("", tests, 7200) != "survived":
        sys.exit(f"{' '.join(tests)} must pass before the code is changed")
    limit = 60 + 5 * (time.monotonic() - start)
    places = []
    for path in sorted(file for each in map(Path, code) for file in ([each] if each.suffix else each.rglob("*.py"))):
        wrapper = MetadataWrapper(cst.parse_module(path.read_text(encoding="utf-8")))
        wrapper.visit(visitor := Places())
        places += [(path, wrapper.module, changes) for changes in visitor.changes]
    draw, fates = random.Random(seed), Counter()
    for path, module, changes in draw.sample(places, min(sample, len(places))):
        line, operator, old, new = draw.choice(changes)
        path.write_text(module.deep_replace(old, new).code, encoding="utf-8")
        fates[found := fate(path.stem.strip("_"), tests, limit)] += 1
        path.write_text(module.code, encoding="utf-8")
        print(f"{found:9}  {path}:{line}  {operator.__name__.removeprefix('operator_')}", flush=True)
        if found == "survived":
            print(f"  - {module.code_for_node(old).strip()}\n  + {module.code_for_node(new).strip()}", flush=True)
    counts = [fates[found] for found in ("killed", "timed out", "survived")]
    row = [" ".join(code), sum(counts), *counts, f"{1 - counts[2] / max(sum(counts), 1):.0%}"]
    print("\n| code | mutants | killed | timed out | survived | share found |\n|---|---|---|---|---|---|")
    print("|", " | ".join(map(str, row)), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--sample", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    parts = [[path for path in asked.paths if path.startswith("tests") is of_tests] for of_tests in (False, True)]
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, listed.stdout.split("\0")):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, Path(folder) / name, follow_symlinks=False)
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode, sys.path[0] = True, folder
        import transformers  # noqa: F401 the forks have it then, and torch

        measure(*parts, asked.sample, asked.seed)
