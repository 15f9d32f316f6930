"""Changes whose calls fail, whose process is killed, or whose machine loses power: nothing acknowledged is lost."""

from pathlib import Path

import pytest
from tiny_hubs import run_program


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


def test_a_change_killed_before_a_call_that_changes_files_loses_nothing_and_can_be_repeated(short):
    found = short("kill")
    assert bad(found) == {}
    # a run may make a call or two less than the one in which they were counted
    assert all(result["kills"] >= result["points"] - 2 >= 3 for result in found.values()), found
    calls = {kind.split()[0] for result in found.values() for kind in result["kinds"]}
    assert calls >= {"openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync"}


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_a_change_killed_at_any_of_its_system_calls_loses_nothing_and_can_be_repeated(long):
    found = long("kill", 0, timeout_s=3500)
    print({change: result["kills"] for change, result in found.items()})
    assert bad(found) == {}
    assert sum(result["kills"] for result in found.values()) >= 1000
    assert all(result["kills"] >= 100 for result in found.values()), found


def test_a_change_that_loses_power_loses_nothing_that_was_acknowledged(short):
    found = short("power")
    assert bad(found) == {}
    assert all(result["cuts"] >= 3 for result in found.values()), found


def test_an_add_that_forgets_to_sync_its_blob_is_noticed(short):
    assert "blob" in str(bad(short("unsynced"))["add"])


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_a_change_that_loses_power_after_any_call_and_any_unsynced_writes_loses_nothing_acknowledged(long):
    found = long("power", 1, 8, timeout_s=3500)
    print({change: result["cuts"] for change, result in found.items()})
    assert bad(found) == {}
    assert sum(result["cuts"] for result in found.values()) >= 1000


# every kill opens connections to both servers anew
@pytest.mark.faults_long
def test_a_writer_killed_before_any_message_leaves_the_old_state_or_the_new_one_and_holds_no_lock(
    postgres_server, s3_server, tmp_path
):
    import s3fs

    s3fs.S3FileSystem().mkdir("killed")
    program = Path(__file__).with_name("remote.py")
    found = run_program(program, tmp_path, postgres_server.url("{}"), "s3://killed/{}", timeout_s=550)
    assert bad(found) == {}
    assert found["add"]["kills"] > 15
    assert all(result["kills"] > 5 for result in found.values())
