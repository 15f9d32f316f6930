"""Damage to the files of a hub, folders that cannot be written, and many processes at once."""

import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from installed import rebuild
from tiny_hubs import adapter

from loraweave.errors import AdapterCorrupt, HubCorrupt
from loraweave.hub.hub import Hub
from loraweave.hub.stores.folder_blobs import blob_path

STORES = Path(__file__).parent / "stores"


def listed(hub):
    return [(record.name, record.hash) for record in hub]


@pytest.fixture
def logged(tmp_path):
    """A copy of a hub of four adapters as a kill would leave it, all in the log; and what was listed after each addition."""
    steps = [[]]
    with Hub(tmp_path / "origin") as hub:
        for seed in range(4):
            hub.add(adapter(seed))
            steps.append(listed(hub))
        shutil.copytree(tmp_path / "origin", tmp_path / "copy")
    (tmp_path / "copy" / "catalogue.sqlite-shm").unlink()
    return tmp_path / "copy", steps


@pytest.mark.parametrize("tenths", range(11))
def test_a_log_that_was_cut_off_leaves_a_beginning_of_the_changes_and_a_rebuild_brings_the_rest_back(logged, tenths):
    path, steps = logged
    log = path / "catalogue.sqlite-wal"
    data = log.read_bytes()
    log.write_bytes(data[: len(data) * tenths // 10])
    # the log holds the schema too; without it the hub refuses to look empty
    with suppress(HubCorrupt), Hub(path) as hub:
        assert listed(hub) in steps
        assert hub.verify().problems == ()
    assert sorted(rebuild(path)) == [f"adapter {seed}" for seed in range(4)]
    with Hub(path) as hub:
        assert hub.verify().ok
        assert sorted(listed(hub)) == steps[-1]


def test_every_flipped_byte_of_a_blob_is_found_on_reading_and_by_verify(tmp_path):
    with Hub(tmp_path) as hub:
        for seed in range(2):
            hub.add(adapter(seed))
        path = blob_path(tmp_path, adapter(1).hash)
        whole = path.read_bytes()
        path.chmod(0o644)
        for place in range(0, len(whole), 13):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            with pytest.raises(AdapterCorrupt, match="'adapter 1'"):
                hub["adapter 1"]
            assert hub.verify().intact == ("adapter 0",)
        path.write_bytes(whole)
        assert hub.verify().ok
        assert hub["adapter 0"].hash == adapter(0).hash


@pytest.mark.parametrize("harm", [b"\0", b"\xa5", b"adapter 0"])
def test_any_page_of_the_catalogue_may_be_overwritten_and_a_rebuild_has_every_adapter(tmp_path, harm):
    with Hub(tmp_path / "origin") as hub:
        for seed in range(3):
            hub.add(adapter(seed))
        wanted = dict(listed(hub))
    whole = (tmp_path / "origin" / "catalogue.sqlite").read_bytes()
    for place in range(0, len(whole), 4096):
        path = tmp_path / str(place)
        shutil.copytree(tmp_path / "origin", path)
        filler = (harm * 4096)[:4096]
        (path / "catalogue.sqlite").write_bytes(whole[:place] + filler + whole[place + 4096 :])
        with suppress(HubCorrupt), Hub(path) as hub:
            for name in hub.verify().intact:
                assert hub[name].hash == wanted[name]
        rebuild(path)
        with Hub(path) as hub:
            assert dict(listed(hub)) == wanted, place
            assert hub.verify().ok


def test_a_hub_of_the_first_schema_is_brought_up_to_date_with_a_backup_and_every_adapter(tmp_path):
    with zipfile.ZipFile(STORES / "schema1.zip") as archive:
        archive.extractall(tmp_path)
    with Hub(tmp_path) as hub:
        assert [record.name for record in hub] == ["adapter 0", "renamed", "ternary", "second name"]
        assert hub.verify().problems == ()
        record = hub.record("adapter 0")
        assert (record.description, record.tags, record.examples) == ("task 0", ("a",), ("one",))
        assert hub["adapter 0"].hash == adapter(0).hash
        assert hub["renamed"].heads["score.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert hub["ternary"].delta("layer")[0].tolist() == [0.5, -0.5, 0, 0.5, 0]
        assert list(hub.vectors("e")) == ["adapter 0"]
        # the removed adapter's blob, and no other
        hub.gc()
        assert len(list(tmp_path.glob("blobs/*/*"))) == 3
        hub.add(adapter(5))
        assert hub.verify().ok
    assert (tmp_path / "catalogue.sqlite.v1.backup").exists()


def test_a_folder_that_cannot_be_written_is_read_and_every_change_is_refused_by_name(short):
    found = short("readonly")
    assert found["unchanged"]
    said = found["said"]
    assert said["names"] == ["adapter 0", "adapter 1", "second name"]
    assert (said["same"], said["problems"]) == (True, [])
    for call in ("add", "update", "rename", "remove", "store_vectors", "gc"):
        assert "cannot be written" in said[call], call


def require_undisturbed(found):
    empty = ("said", "missing", "unwanted", "wrong", "problems")
    assert {key: found[key] for key in empty if found[key]} == {}
    assert set(found["statuses"]) == {0}
    assert (found["described"], found["long reader"], found["held"]) == (True, True, True)


def test_twenty_writers_with_slow_renames_lose_nothing_beside_readers_and_gc(short):
    require_undisturbed(short("crowd"))


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_twenty_writers_lose_nothing_for_minutes(long):
    require_undisturbed(long("crowd", 20, 60, timeout_s=3500))
