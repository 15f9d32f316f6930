"""Several processes on one hub, and writers killed with SIGKILL."""

import os
from pathlib import Path

import pytest
from tiny_hubs import run_program

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")

DRIVER = Path(__file__).with_name("killed_writers.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the driver reports; one process does everything, since starting it takes longer than its work."""
    return run_program(DRIVER, tmp_path_factory.mktemp("hubs"), timeout_s=550)


def test_a_writer_killed_between_any_two_steps_leaves_the_old_state_or_the_new_one(found):
    changes = found["every step"]
    assert {change: result["bad"] for change, result in changes.items() if result["bad"]} == {}
    assert changes["add"]["kills"] > 20
    assert all(result["kills"] > 5 for result in changes.values())


def test_a_hub_whose_creation_was_killed_at_any_step_opens_empty(found):
    assert found["creating"]["bad"] == []
    assert found["creating"]["kills"] > 15


def test_writers_killed_at_random_lose_no_acknowledged_adapter(found):
    result = found["random"]
    # lost, of other content, problems, left in tmp/
    assert result["bad"] == [[], [], [], []]
    assert result["kills"] == 20
    # a writer may die between the commit and its acknowledgement
    assert 0 < result["acknowledged"] <= result["there"] <= result["acknowledged"] + 20


def test_a_reader_sees_whole_adapters_in_order_while_another_process_adds(found):
    assert found["reading"] == {"final": 25, "prefixes": True, "unread": []}


def test_a_hub_that_was_open_before_a_fork_serves_parent_and_child(found):
    assert found["fork"] == {"status": 0, "there": 11, "generation": 11, "problems": []}
