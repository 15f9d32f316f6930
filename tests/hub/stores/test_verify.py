"""Damage to blobs, rows and the whole catalogue: found, named, kept from spreading, and repaired where that can be done."""

import errno
import os
import random
import sqlite3

import numpy as np
import pytest
from installed import rebuild
from tiny_hubs import adapter, flip, run_sql

import loraweave.hub.stores.blobs
from loraweave.errors import AdapterCorrupt, HubCorrupt, HubError
from loraweave.hub.hub import Hub
from loraweave.hub.stores.folder_blobs import blob_path

NUM_DAMAGES = 60


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        for seed in range(3):
            hub.add(adapter(seed), description=f"number {seed}")
        yield hub


def blob_of(hub, name):
    return blob_path(hub.path, hub.record(name).hash)


def test_a_sound_hub_has_no_problems(hub):
    report = hub.verify()
    assert report.ok
    assert (report.problems, report.orphans) == ((), ())
    assert report.intact == ("adapter 0", "adapter 1", "adapter 2")


@pytest.mark.parametrize("harm", [flip, lambda path: path.unlink(), lambda path: os.truncate(path, 10)])
def test_adding_a_damaged_adapter_again_heals_it_under_every_name(hub, harm):
    hub.add(adapter(1, "twin"))
    harm(blob_of(hub, "adapter 1"))
    with pytest.raises(AdapterCorrupt, match="'twin'"):
        hub["twin"]
    hub.add(adapter(1))
    assert hub.verify().ok
    assert hub["twin"].hash == adapter(1).hash
    assert len(hub) == 4


def test_a_damaged_leftover_of_an_interrupted_add_is_not_taken_for_a_blob(hub):
    path = blob_path(hub.path, adapter(9).hash)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(blob_of(hub, "adapter 0").read_bytes())
    assert hub.verify().orphans == (path.stem,)
    hub.add(adapter(9))
    assert hub["adapter 9"].hash == adapter(9).hash
    assert hub.verify().ok


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE adapters SET record = replace(record, 'number 1', 'number 7') WHERE name = 'adapter 1'", "sha256"),
        ("UPDATE adapters SET name = 'adapter 7' WHERE name = 'adapter 1'", "column name is 'adapter 7'"),
        ("UPDATE adapters SET hash = (SELECT hash FROM adapters WHERE seq = 1) WHERE seq = 2", "column hash"),
        ("UPDATE blobs SET size_bytes = 1 WHERE hash = (SELECT hash FROM adapters WHERE seq = 2)", "row of blob"),
        ("DELETE FROM blobs WHERE hash = (SELECT hash FROM adapters WHERE seq = 2)", "no blob row"),
    ],
)
def test_a_row_changed_behind_the_hubs_back_is_never_believed(hub, statement, message):
    run_sql(hub.path, statement)
    with pytest.raises(HubCorrupt, match=message):
        list(hub)
    report = hub.verify()
    assert len(report.problems) == 1
    assert report.intact == ("adapter 0", "adapter 2")
    with pytest.raises(HubCorrupt):
        hub.gc()
    assert hub["adapter 0"].hash == adapter(0).hash


def test_a_row_that_vanished_is_missed(hub):
    run_sql(hub.path, "DELETE FROM adapters WHERE name = 'adapter 1'")
    assert hub.verify().problems == ("the catalogue has the rows of 2 adapters, but 3 were added",)


def test_a_damaged_vector_is_left_out_and_reported(hub):
    hub.store_vectors("e", [(f"adapter {seed}", "d", np.ones(3)) for seed in (0, 1)])
    run_sql(hub.path, "UPDATE vectors SET vector = zeroblob(12) WHERE seq = 1")
    assert list(hub.vectors("e")) == ["adapter 1"]
    assert len(hub.verify().problems) == 1


def test_damaged_pages_are_found_or_harmless_and_never_a_wrong_answer(hub):
    good = {record.name: record for record in hub}
    hub.close()
    path = hub.path / "catalogue.sqlite"
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(NUM_DAMAGES):
        data = bytearray(whole)
        start = rng.randrange(len(data) - 16)
        data[start : start + 16] = rng.randbytes(16)
        for side in ("-wal", "-shm"):
            path.with_name(path.name + side).unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            with Hub(hub.path) as damaged:
                report = damaged.verify()
                try:
                    found = {record.name: record for record in damaged}
                except HubError:
                    assert not report.ok
                    continue
                assert found == good or not report.ok
                assert all(good[name] == record for name, record in found.items())
        except HubError:
            continue


def test_a_lost_catalogue_is_not_replaced_by_an_empty_one(hub):
    hub.close()
    (hub.path / "catalogue.sqlite").unlink()
    with pytest.raises(HubCorrupt, match=r"missing or empty.*rebuild"):
        Hub(hub.path)


def test_a_lost_catalogue_is_rebuilt_from_the_blobs(hub):
    good = {record.name: record for record in hub}
    hub.close()
    (hub.path / "catalogue.sqlite").unlink()
    assert sorted(rebuild(hub.path)) == sorted(good)
    with Hub(hub.path) as rebuilt:
        assert {record.name: record for record in rebuilt} == good
        assert rebuilt.verify().ok
        assert rebuilt["adapter 2"].hash == adapter(2).hash


def test_a_rebuild_keeps_rows_that_are_intact_in_their_order_and_the_old_file(hub):
    hub.rename("adapter 0", "zero")
    hub.update("adapter 2", description="later")
    run_sql(hub.path, "UPDATE adapters SET record = 'x' WHERE name = 'adapter 1'")
    flip(blob_of(hub, "adapter 2"))
    hub.close()
    assert rebuild(hub.path) == ["zero", "adapter 1"]
    with Hub(hub.path) as rebuilt:
        assert [(record.name, record.description) for record in rebuilt] == [("zero", "number 0"), ("adapter 1", "number 1")]
        assert rebuilt.verify().ok
        rebuilt.add(adapter(2))
        assert rebuilt.verify().ok
    assert (hub.path / "catalogue.sqlite.corrupt-1").exists()


@pytest.mark.parametrize("num_renames", [0, 1, 2, 3])
def test_a_rebuild_that_was_interrupted_at_any_rename_is_finished_by_the_next_and_loses_no_name(
    hub, monkeypatch, num_renames
):
    hub.rename("adapter 0", "zero")
    hub.add(adapter(1, "twin"))
    run_sql(hub.path, "DELETE FROM state")
    left = [num_renames]

    def replace(source, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            rebuild(hub.path)
    hub.close()
    assert rebuild(hub.path) == ["zero", "adapter 1", "adapter 2", "twin"]
    with Hub(hub.path) as rebuilt:
        assert rebuilt.verify().ok
        assert [record.name for record in rebuilt] == ["zero", "adapter 1", "adapter 2", "twin"]


@pytest.mark.parametrize("statement", ["SELECT seq FROM adapters", "INSERT INTO adapters", "PRAGMA wal_checkpoint"])
def test_a_rebuild_on_a_failing_disk_is_named_and_leaves_the_old_catalogue_in_place(hub, monkeypatch, statement):
    hub.rename("adapter 0", "zero")
    hub.close()
    real = sqlite3.connect

    class Failing(sqlite3.Connection):
        def execute(self, text, *args):
            if text.startswith(statement):
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
                raise error
            return super().execute(text, *args)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *args, **kwargs: real(*args, **kwargs, factory=Failing))
        with pytest.raises(HubError, match="rebuilding the catalogue: the file system failed"):
            rebuild(hub.path)
    with Hub(hub.path) as same:
        assert [record.name for record in same] == ["zero", "adapter 1", "adapter 2"]


def test_a_file_system_that_fails_for_now_is_not_taken_for_damage(hub, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("unable to open file <blob> in read-only mode: Input/output error (5)")

    with monkeypatch.context() as patch:
        patch.setattr(loraweave.hub.stores.blobs, "safe_open", failing)
        with pytest.raises(HubError, match=r"the file system failed.*unable to open file") as caught:
            hub["adapter 1"]
        assert not isinstance(caught.value, AdapterCorrupt)
    assert hub["adapter 1"].hash == adapter(1).hash


def test_a_stale_handle_on_opening_is_named(hub, monkeypatch):
    def stale(*args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", stale)
        with pytest.raises(HubError, match=r"opening the hub: the file system failed.*Stale file handle"):
            Hub(hub.path)
    with Hub(hub.path) as same:
        assert len(same) == 3


def test_two_blobs_first_added_under_one_name_both_come_back(hub):
    hub.rename("adapter 0", "zero")
    hub.add(adapter(5), name="adapter 0")
    hub.close()
    (hub.path / "catalogue.sqlite").write_bytes(b"nothing of use" * 300)
    names = rebuild(hub.path)
    assert len(names) == len(set(names)) == 4
    with Hub(hub.path) as rebuilt:
        assert {record.hash for record in rebuilt} == {adapter(seed).hash for seed in (0, 1, 2, 5)}
