"""What `scripts/check` runs: which tools, on which places, with which tests."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import loraweave as lw

ROOT = Path(__file__).parents[1]
CHECK = (ROOT / "scripts" / "check").read_text(encoding="utf-8")
TOOLS = ("ruff", "mypy", "python")


@pytest.fixture
def check(tmp_path):
    """check(*words): the exit status, and the calls of the tools, which are stubs that fail where $FAILING names them."""
    for tool in (*TOOLS, "python3.11", "python3.13", "python3.14"):
        stub = tmp_path / tool
        stub.write_text(f'#!/bin/sh\necho {tool} "$@" >>"{tmp_path}/calls"\n[ "$FAILING" != {tool} ]\n')
        stub.chmod(0o755)

    def run(*words, failing=""):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAILING": failing}
        done = subprocess.run(
            [ROOT / "scripts" / "check", *words], env=environment, capture_output=True, text=True, timeout=60
        )
        calls = tmp_path / "calls"
        said = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return done, said

    return run


def pytest_calls(calls):
    return [call for call in calls if call.startswith("python -m pytest")]


def test_readme_sets_up_and_runs_the_fast_checks():
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks[1].splitlines()[-1] == "scripts/check fast"


def test_fast_leaves_out_what_needs_more_than_python_and_rest_has_it(check):
    _, calls = check("fast")
    [fast] = pytest_calls(calls)
    assert "-m not slow and not apart and not gpu and not faults_long" in fast
    assert {call.split()[0] for call in calls} == set(TOOLS)
    _, calls = check("rest")
    assert any("-m (slow or apart) and not gpu and not faults_long" in call for call in pytest_calls(calls))


@pytest.mark.parametrize(
    ("place", "tests"),
    [
        ("composer/merge", "tests/composer/merge"),
        ("loraweave/lowrank/", "tests/lowrank"),
        ("loraweave/lowrank/algebra.py", "tests/lowrank/test_algebra.py"),
        ("tests/hub/search", "tests/hub/search"),
    ],
)
def test_a_place_is_checked_with_the_tests_that_mirror_it(check, place, tests):
    done, calls = check(place)
    assert done.returncode == 0, done.stderr
    [run] = pytest_calls(calls)
    assert run.endswith(f"-m not gpu and not faults_long {tests}")
    assert f"ruff check {place} {tests}" in calls


def test_the_oldest_versions_are_the_lower_bounds_of_the_project(check):
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = [text.replace(">=", "==") for text in dependencies]
    done = subprocess.run(
        ["bash", "-c", "sed -nE '" + re.search(r"sed -nE '(.*)' pyproject", CHECK)[1] + "' pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == bounds
    assert check("oldest")[1][0].startswith("python3.11 -m venv ")


def test_the_workflow_runs_these_checks_on_the_versions_that_are_supported():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    runs = [step["run"] for job in workflow.values() for step in job["steps"] if "run" in step]
    named = {word for run in runs if run.startswith("scripts/check") for word in re.findall(r"check (\w+)$", run)}
    assert named | set(workflow["bounds"]["strategy"]["matrix"]["versions"]) == {"fast", "oldest", "newest", "release"}
    assert workflow["check"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]


def test_the_version_is_the_same_wherever_it_stands():
    named = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert named == project == lw.__version__


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_fails_fails_the_check(check, tool):
    assert check("retrieval", failing=tool)[0].returncode != 0
    assert check("fast", failing=tool)[0].returncode != 0


@pytest.mark.parametrize(
    ("place", "why"),
    [("hub/serach", "no such place"), ("composer/__init__.py", "no tests of its own"), ("--fast", "no such")],
)
def test_a_place_that_is_none_or_has_no_tests_is_refused_by_name(check, place, why):
    done, calls = check("retrieval", place)
    assert (done.returncode, calls) == (2, [])
    assert place in done.stderr
    assert why in done.stderr


def test_everything_is_fast_then_rest(check):
    _, calls = check()
    assert ["not slow" in call for call in pytest_calls(calls)][:2] == [True, False]
