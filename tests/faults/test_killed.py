"""SIGKILL at system calls of every change: the hub is as before or as after, whole, and the change can be repeated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill.py")


def kill(folder, most, timeout_s):
    """What the program reports; it is a process of its own since it forks, which a process with threads must not."""
    command = [sys.executable, str(PROGRAM), str(folder), str(most)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    if not found:
        pytest.skip("this machine lets no process trace its child by ptrace")
    return found


def test_a_change_killed_before_a_call_that_changes_files_loses_nothing_and_can_be_repeated(tmp_path):
    found = kill(tmp_path, 12, 300)
    assert {change: result["bad"] for change, result in found.items() if result["bad"]} == {}
    assert all(result["kills"] >= 10 for result in found.values()), found


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_a_change_killed_at_any_of_its_system_calls_loses_nothing_and_can_be_repeated(tmp_path):
    found = kill(tmp_path, 0, 3500)
    print({change: result["kills"] for change, result in found.items()})
    assert {change: result["bad"] for change, result in found.items() if result["bad"]} == {}
    assert sum(result["kills"] for result in found.values()) >= 1000
    assert all(result["kills"] >= 100 for result in found.values()), found
