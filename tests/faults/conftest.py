"""Runs the parts of the suite in processes of their own: they fork, which a process with threads must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_hubs import run_program

PROGRAM = Path(__file__).with_name("run.py")

# the short form of every part, in one process, since starting it takes longer than most of them
SHORT = {
    "kill": ("kill", [10]),
    "power": ("power", [8, 0]),
    "unsynced": ("power", [3, 0, True]),
    "failing": ("failing", [2]),
    "crowd": ("crowd", [20, 3]),
    "readonly": ("readonly", []),
    "outsized": ("outsized", [6]),
    "fuzz": ("fuzz", [2_500, 0]),
}


def pytest_itemcollected(item):
    # the first of these waits for all parts, on a busy machine for longer than a test may take
    if "short" in item.fixturenames:
        item.add_marker(pytest.mark.timeout(1800))


def reports(folder, parts, timeout_s):
    return run_program(PROGRAM, folder, json.dumps(parts), timeout_s=timeout_s)


@pytest.fixture(scope="session")
def short_reports(tmp_path_factory):
    return dict(zip(SHORT, reports(tmp_path_factory.mktemp("faults"), list(SHORT.values()), 1700), strict=True))


@pytest.fixture
def short(short_reports):
    """What the short form of a part reports; the test is skipped where a part cannot run on this machine."""
    return lambda part: _possible(short_reports[part])


@pytest.fixture
def long(tmp_path):
    """What a part reports with the arguments given."""
    return lambda part, *arguments, timeout_s: _possible(reports(tmp_path, [(part, arguments)], timeout_s)[0])


def _possible(report):
    if not report:
        pytest.skip("this machine lets no process trace its child by ptrace")
    return report
