"""SIGKILL at system calls of every change: the hub is as before or as after, whole, and the change can be repeated."""

import pytest


def bad(found):
    return {change: result["bad"] for change, result in found.items() if result["bad"]}


def test_a_change_killed_before_a_call_that_changes_files_loses_nothing_and_can_be_repeated(short):
    found = short("kill")
    assert bad(found) == {}
    # a change of few calls has few points to be killed at
    assert all(result["kills"] >= min(8, result["points"]) for result in found.values()), found
    assert all(result["points"] >= 5 for result in found.values()), found


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_a_change_killed_at_any_of_its_system_calls_loses_nothing_and_can_be_repeated(long):
    found = long("kill", 0, timeout_s=3500)
    print({change: result["kills"] for change, result in found.items()})
    assert bad(found) == {}
    assert sum(result["kills"] for result in found.values()) >= 1000
    assert all(result["kills"] >= 100 for result in found.values()), found
