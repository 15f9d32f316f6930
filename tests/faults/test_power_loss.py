"""Power lost after any call of a change: what was acknowledged is there, and nothing is half there."""

import pytest


def bad(found):
    return {change: result["bad"] for change, result in found.items() if result["bad"]}


def test_a_change_that_loses_power_loses_nothing_that_was_acknowledged(short):
    found = short("power")
    assert bad(found) == {}
    assert all(result["cuts"] >= 3 for result in found.values()), found


def test_an_add_that_forgets_to_sync_its_blob_is_noticed(short):
    found = short("unsynced")
    assert "blob" in str(bad(found)["add"])


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_a_change_that_loses_power_after_any_call_and_any_unsynced_writes_loses_nothing_acknowledged(long):
    found = long("power", 1, 8, timeout_s=3500)
    print({change: result["cuts"] for change, result in found.items()})
    assert bad(found) == {}
    assert sum(result["cuts"] for result in found.values()) >= 1000
