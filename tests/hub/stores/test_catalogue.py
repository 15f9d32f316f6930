"""The SQLite catalogue beside forks, and in a folder that may only be read."""

from __future__ import annotations

import os
import sys

import pytest
from tiny_hubs import adapter, ended, forked

from loraweave.hub.hub import Hub
from loraweave.hub.stores import catalogue


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_waits_for_no_hub_that_is_idle_and_both_sides_go_on(tmp_path, monkeypatch):
    # whoever waited would wait beyond the test's own limit
    monkeypatch.setattr(catalogue, "_FORK_WAIT_S", 3600.0)
    with Hub(tmp_path / "hub") as hub:
        hub.add(adapter(1))
        assert ended(forked(lambda: hub.add(adapter(2)))) == 0
        hub.add(adapter(3))
        assert [record.name for record in hub] == ["adapter 1", "adapter 2", "adapter 3"]
        assert hub.verify().ok


def test_an_emptied_log_takes_no_space_and_loses_nothing(tmp_path):
    log = tmp_path / "hub" / "catalogue.sqlite-wal"
    with Hub(tmp_path / "hub") as hub:
        hub.add(adapter(1))
        assert log.stat().st_size > 0
        with hub._catalogue.locked("emptying the log"):
            hub._catalogue.empty_log()
        assert log.stat().st_size == 0
        assert hub.verify().ok
    with Hub(tmp_path / "hub") as hub:
        assert [record.name for record in hub] == ["adapter 1"]


def test_reading_a_folder_that_cannot_be_written_makes_no_file_in_it(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as hub:
        hub.add(adapter(1))
    before = sorted(os.listdir(tmp_path / "hub"))
    assert not any(name.endswith(("-wal", "-shm")) for name in before)
    monkeypatch.setattr(catalogue.Catalogue, "_folder_is_writable", lambda self: False)
    with Hub(tmp_path / "hub") as hub, hub._catalogue.reading() as connection:
        assert connection.execute("SELECT name FROM adapters").fetchall() == [("adapter 1",)]
        assert sorted(os.listdir(tmp_path / "hub")) == before
