"""Compositions in a hub: whole or not at all, under names of their own, whatever they say."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
from installed import rebuild
from tiny_hubs import Saved, adapter, flip, run_sql

from loraweave.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    HubCorrupt,
    HubError,
    InvalidName,
)
from loraweave.hub.compositions import MAX_FILES
from loraweave.hub.hub import Hub
from loraweave.hub.stores import migrations


def content(stored):
    return {path: stored.read(path) for path in stored.files}


def test_what_is_saved_comes_back_byte_for_byte_under_its_name(hub, tmp_path):
    stored = hub.save_composition("support bot", Saved("new"))
    assert (stored.name, stored.report, stored.formula) == ("support bot", {"chosen": "new"}, None)
    assert stored.files == {"composition.json": 29, "below/weights": 256}
    found = hub.composition("support bot")
    assert (found.hash, found.created, content(found)) == (stored.hash, stored.created, content(stored))
    folder = found.write(tmp_path / "out")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "below/weights",
        "composition.json",
    ]
    assert (folder / "below" / "weights").read_bytes() == bytes(range(256))
    with found.unpacked() as unpacked:
        assert json.loads((unpacked / "composition.json").read_text()) == {"report": {"chosen": "new"}}
    assert not unpacked.exists()


def test_the_names_of_compositions_and_of_adapters_are_apart_and_sorted(hub):
    hub.add(adapter(0), name="x")
    for name in ("x", "b/../c", "ä: b"):
        hub.save_composition(name, Saved(name))
    assert [stored.name for stored in hub.compositions()] == ["b/../c", "x", "ä: b"]
    assert hub.composition("a\u0308: b").report == {"chosen": "ä: b"}
    assert len(hub) == 1
    hub.remove("x")
    hub.remove_composition("b/../c")
    assert [stored.name for stored in hub.compositions()] == ["x", "ä: b"]


def test_an_unknown_name_is_told_with_near_misses(hub):
    hub.save_composition("support-bot", Saved("new"))
    for call in (hub.composition, hub.remove_composition):
        with pytest.raises(AdapterNotFound, match=r"no composition 'suport-bot' .* did you mean 'support-bot'"):
            call("suport-bot")
        with pytest.raises(AdapterNotFound, match=r"no composition '\\x00' .* it has 1, none of a like name"):
            call("\0")


def test_other_content_under_a_name_needs_replace_and_the_same_is_there_already(hub):
    first = hub.save_composition("x", Saved("old"))
    generation = hub.generation
    assert hub.save_composition("x", Saved("old")).created == first.created
    assert hub.generation == generation
    with pytest.raises(AdapterExists, match="stands for another composition"):
        hub.save_composition("x", Saved("new"))
    assert hub.composition("x").hash == first.hash
    assert hub.save_composition("x", Saved("new"), replace=True).report == {"chosen": "new"}
    assert [stored.report for stored in hub.compositions()] == [{"chosen": "new"}]


def test_what_is_no_composition_is_refused_and_leaves_nothing(hub, tmp_path):
    class Empty:
        def save_pretrained(self, folder):
            folder.mkdir()

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("no recipe")
    for wrong in (5, "a + b", tmp_path / "folder", tmp_path / "nowhere", Empty()):
        with pytest.raises(HubError, match="composition"):
            hub.save_composition("x", wrong)
    with pytest.raises(InvalidName):
        hub.save_composition("", Saved("new"))
    assert hub.compositions() == []
    assert list(hub._blobs.names()) == []


def test_links_and_too_many_files_are_refused(hub, tmp_path, monkeypatch):
    folder = Saved("new").save_pretrained(tmp_path / "folder")
    os.symlink("/etc/passwd", folder / "below" / "link")
    with pytest.raises(HubError, match="is a link"):
        hub.save_composition("x", folder)
    (folder / "below" / "link").unlink()
    monkeypatch.setattr("loraweave.hub.compositions.MAX_FILES", 1)
    with pytest.raises(HubError, match="more than 1 files"):
        hub.save_composition("x", folder)
    assert MAX_FILES > 1000


@pytest.mark.parametrize("path", ["../out", "/out", "a/../../out", "c:out", "a\\b", ""])
def test_a_path_that_leads_out_of_the_folder_is_not_written(hub, tmp_path, path):
    row = hub.save_composition("x", Saved("new"))._row
    vars(row)["files"] = {**row.files, path: row.files["below/weights"]}
    stored = type(hub.composition("x"))(row, hub._blobs)
    with pytest.raises(AdapterCorrupt, match="is not a path inside the folder"):
        stored.write(tmp_path / "deep" / "deeper")
    assert not (tmp_path / "deep" / "deeper").exists()
    assert not list(tmp_path.rglob("out"))


def test_gc_keeps_what_compositions_need_and_frees_what_none_needs(hub):
    hub.save_composition("x", Saved("old"))
    hub.save_composition("y", Saved("new"))
    assert hub.gc() == 0
    hub.remove_composition("y")
    # the weights are those of x too
    assert hub.gc() == 29
    assert hub.composition("x").report == {"chosen": "old"}
    assert hub.verify().ok
    hub.remove_composition("x")
    assert hub.gc() == 29 + 256
    assert list(hub._blobs.names()) == []


def test_damage_to_a_file_is_reported_named_and_mended_by_saving_again(hub):
    stored = hub.save_composition("x", Saved("new"))
    digest = stored._row.files["below/weights"][0]
    flip(hub._blobs.folder / "blobs" / digest[:2] / f"{digest}.safetensors")
    with pytest.raises(AdapterCorrupt, match="below/weights of composition 'x'"):
        hub.composition("x").read("below/weights")
    assert [problem for problem in hub.verify().problems if "below/weights of composition 'x'" in problem]
    hub.save_composition("x", Saved("new"))
    assert hub.verify().ok
    hub._blobs.remove(digest)
    assert any("is missing" in problem for problem in hub.verify().problems)


def test_a_damaged_or_lost_row_is_reported_and_gc_deletes_nothing(hub):
    hub.save_composition("x", Saved("new"))
    hub.save_composition("y", Saved("old"))
    blobs = list(hub._blobs.names())
    run_sql(hub.path, "UPDATE compositions SET record = replace(record, 'below', 'above') WHERE name = 'x'")
    with pytest.raises(HubCorrupt, match="composition 'x' in the catalogue is damaged"):
        hub.composition("x")
    assert any("composition 'x'" in problem for problem in hub.verify().problems)
    with pytest.raises(HubCorrupt):
        hub.gc()
    assert hub.save_composition("z", Saved("z")).name == "z"
    hub.remove_composition("z")
    run_sql(hub.path, "DELETE FROM compositions WHERE name = 'x'")
    with pytest.raises(HubCorrupt, match="rows of 1 compositions, but 2 were saved; nothing was deleted"):
        hub.gc()
    assert any("the rows of 1 compositions, but 2 were added" in problem for problem in hub.verify().problems)
    assert set(blobs) <= set(hub._blobs.names())


def test_a_rebuilt_catalogue_has_the_compositions_whose_rows_and_files_are_whole(hub):
    hub.add(adapter(0))
    for name in ("kept", "damaged row", "lost file"):
        hub.save_composition(name, Saved(name))
    run_sql(hub.path, "UPDATE compositions SET sha256 = 'x' WHERE name = 'damaged row'")
    hub._blobs.remove(hub.composition("lost file")._row.files["composition.json"][0])
    folder = hub.path
    hub.close()
    assert rebuild(folder) == ["adapter 0"]
    with Hub(folder) as again:
        assert [(stored.name, stored.report) for stored in again.compositions()] == [("kept", {"chosen": "kept"})]
        assert again.verify().ok


def test_a_hub_of_the_schema_before_gains_the_shelf_and_keeps_its_adapters(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", migrations.STEPS[:5])
        connection = sqlite3.connect((tmp_path / "catalogue.sqlite"), isolation_level=None)
        migrations.migrate(connection, tmp_path / "catalogue.sqlite")
        connection.close()
    with Hub(tmp_path) as hub:
        assert hub.compositions() == []
        hub.save_composition("x", Saved("new"))
        assert hub.verify().ok
