"""Which place a hub's blobs have, and that a hub never takes another's for its own."""

from __future__ import annotations

import json
import sqlite3

import pytest
from installed import rebuild, require_entry
from tiny_hubs import adapter

from loraweave.errors import HubCorrupt, HubError
from loraweave.hub.hub import Hub
from loraweave.hub.stores import migrations
from loraweave.hub.stores.folder_blobs import FolderBlobs


@pytest.fixture
def places(tmp_path):
    with Hub(tmp_path / "hub", blobs=tmp_path / "blobs") as hub:
        hub.add(adapter(0))
    return tmp_path / "hub", tmp_path / "blobs"


def test_a_hub_in_a_folder_remembers_where_its_blobs_are(places):
    folder, blobs = places
    assert not (folder / "blobs").exists()
    assert len(list(blobs.glob("blobs/*/*.safetensors"))) == 1
    for options in ({}, {"blobs": blobs}):
        with Hub(folder, **options) as hub:
            assert hub["adapter 0"].hash == adapter(0).hash
            assert hub.verify().ok


def test_an_empty_folder_that_is_there_is_taken_for_the_blobs(tmp_path):
    (tmp_path / "blobs").mkdir()
    for _ in range(2):
        with Hub(tmp_path / "hub", blobs=tmp_path / "blobs") as hub:
            hub.add(adapter(0))
            assert hub.verify().ok
    assert len(list((tmp_path / "blobs").glob("blobs/*/*.safetensors"))) == 1


def test_another_place_for_the_blobs_is_refused_with_both_names(places, tmp_path):
    with pytest.raises(HubError, match=f"are at {places[1]}, not at {tmp_path / 'elsewhere'}"):
        Hub(places[0], blobs=tmp_path / "elsewhere")
    with Hub(tmp_path / "plain") as plain:
        plain.add(adapter(0))
    with pytest.raises(HubError, match="keeps its blobs in its own folder"):
        Hub(tmp_path / "plain", blobs=tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_blobs_of_another_hub_are_refused_before_gc_could_delete_them(places, tmp_path):
    with pytest.raises(HubError, match="belong to another hub"):
        Hub(tmp_path / "second", blobs=places[1])
    with Hub(places[0]) as hub:
        assert hub.verify().ok


def test_a_place_that_is_not_mounted_is_told_from_an_empty_hub(places):
    places[1].rename(places[1].with_name("unmounted"))
    with pytest.raises(HubError, match=r"has 1 adapters, but .* is not the place of their blobs; is it mounted"):
        Hub(places[0])
    places[1].with_name("unmounted").rename(places[1])
    with Hub(places[0]) as hub:
        assert hub["adapter 0"].hash == adapter(0).hash


def step_that_fails(places, monkeypatch):
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, ("SELECT * FROM nowhere",)))


def blobs_of_another(places, monkeypatch):
    (places[1] / "hub-id").unlink()
    (places[1] / "hub-id").write_text("another")


def blobs_that_are_not_mounted(places, monkeypatch):
    places[1].rename(places[1].with_name("unmounted"))


def folder_that_cannot_be_swept(places, monkeypatch):
    def fail(self, older_than_s):
        raise OSError(5, "as the system says it")

    monkeypatch.setattr(FolderBlobs, "sweep", fail)


@pytest.mark.parametrize("why", [step_that_fails, blobs_of_another, blobs_that_are_not_mounted, folder_that_cannot_be_swept])
def test_a_hub_that_cannot_be_opened_leaves_no_connection_open(places, monkeypatch, why):
    made, real = [], sqlite3.connect

    class Watched(sqlite3.Connection):
        closed = False

        def close(self):
            self.closed = True
            super().close()

    def connect(*args, **options):
        made.append(real(*args, **options, factory=Watched))
        return made[-1]

    why(places, monkeypatch)
    monkeypatch.setattr(sqlite3, "connect", connect)
    # the error is held on to, and with it the frames that had a connection
    with pytest.raises(HubError) as found:
        Hub(places[0])
    assert made
    assert all(connection.closed for connection in made), found.value


def test_a_note_that_is_damaged_is_named_with_its_form(places):
    (places[0] / "blobs.json").chmod(0o644)
    (places[0] / "blobs.json").write_text("{")
    with pytest.raises(HubCorrupt, match=r"blobs\.json is damaged"):
        Hub(places[0])


def test_the_note_has_no_credentials(tmp_path):
    require_entry("blobs", "fsspec")
    pytest.importorskip("fsspec")
    with Hub(tmp_path / "hub", blobs="memory://me:secret@notes/prefix"):
        pass
    assert json.loads((tmp_path / "hub" / "blobs.json").read_text())["blobs"] == "memory://notes/prefix"


def test_a_file_url_is_the_folder(tmp_path):
    with Hub(tmp_path / "hub", blobs=f"file://{tmp_path / 'blobs'}") as hub:
        hub.add(adapter(0))
    assert len(list((tmp_path / "blobs").glob("blobs/*/*.safetensors"))) == 1


def test_a_lost_catalogue_is_rebuilt_from_blobs_that_are_elsewhere(places):
    (places[0] / "catalogue.sqlite").unlink()
    with pytest.raises(HubCorrupt, match=r"missing or empty.*rebuild"):
        Hub(places[0])
    assert rebuild(places[0]) == ["adapter 0"]
    with Hub(places[0]) as hub:
        assert hub["adapter 0"].hash == adapter(0).hash
        assert hub.verify().ok


def test_a_damaged_blob_elsewhere_is_left_out_of_a_rebuild(places):
    with Hub(places[0]) as hub:
        hub.add(adapter(1))
        path = places[1] / "blobs" / hub.record("adapter 0").hash[:2] / f"{hub.record('adapter 0').hash}.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    (places[0] / "catalogue.sqlite").write_bytes(b"nothing of use" * 300)
    assert rebuild(places[0]) == ["adapter 1"]
