"""Writers of a hub on PostgreSQL and S3 are killed before each of their messages to the servers."""

from __future__ import annotations

import pytest

# every kill opens connections to both servers anew
pytestmark = pytest.mark.faults_long


@pytest.fixture
def found(program, postgres_server, s3_server):
    import s3fs

    s3fs.S3FileSystem().mkdir("killed")
    return program("remote.py", postgres_server.url("{}"), "s3://killed/{}")


def test_a_writer_killed_before_any_message_leaves_the_old_state_or_the_new_one_and_holds_no_lock(found):
    assert {change: result["bad"] for change, result in found.items() if result["bad"]} == {}
    assert found["add"]["kills"] > 15
    assert all(result["kills"] > 5 for result in found.values())
