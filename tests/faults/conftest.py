"""Runs the suite's programs, which are processes of their own: they fork, and a process with threads must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def program(tmp_path):
    """Calls a program of this folder with an empty folder and the arguments given, and returns what it prints as JSON."""

    def run(name, *arguments, timeout_s=300):
        command = [sys.executable, str(HERE / name), str(tmp_path), *map(str, arguments)]
        # more threads would only take memory that is counted
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def tracing_program(program):
    """The same for a program that traces its children; the test is skipped where that is not allowed."""

    def run(name, *arguments, timeout_s=300):
        found = program(name, *arguments, timeout_s=timeout_s)
        if not found:
            pytest.skip("this machine lets no process trace its child by ptrace")
        return found

    return run
