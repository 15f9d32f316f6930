"""System calls of a change fail: the error has a name, the hub is as it was, and the change can be repeated."""

import pytest


def bad(found):
    return {case: result["bad"] for case, result in found.items() if result["bad"]}


def test_a_full_disk_a_failing_one_and_a_stale_handle_are_named_and_change_nothing(short):
    found = short("failing")
    assert bad(found) == {}
    assert sum(result["named"] for result in found.values()) >= sum(result["failures"] for result in found.values()) / 2


@pytest.mark.faults_long
@pytest.mark.timeout(7200)
def test_any_call_that_fails_is_named_and_changes_nothing(long):
    found = long("failing", 0, timeout_s=7000)
    print({case: (result["failures"], result["named"]) for case, result in found.items()})
    assert bad(found) == {}
    assert sum(result["failures"] for result in found.values()) >= 1000
