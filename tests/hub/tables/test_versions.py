"""Versions of one name: history, rollback, pruning, and what gc, verify and rebuild make of them."""

import hashlib
import json
import sqlite3

import pytest
import tiny_hubs
from installed import rebuild
from tiny_hubs import flip, run_sql

from loraweave.errors import AdapterCorrupt, AdapterExists, AdapterNotFound, HubCorrupt, HubError
from loraweave.hub.hub import Hub
from loraweave.hub.stores import migrations
from loraweave.hub.stores.folder_blobs import blob_path


def adapter(seed, name="x", **fields):
    return tiny_hubs.adapter(seed, name, **fields)


@pytest.fixture
def hub(tmp_path):
    """`x` in three versions between two other adapters."""
    with Hub(tmp_path / "hub") as hub:
        hub.add(adapter(10, "before"))
        hub.add(adapter(0), description="first", tags=["t"])
        hub.add(adapter(11, "after"))
        hub.add(adapter(1), replace=True, description="second")
        hub.add(adapter(2), replace=True)
        yield hub


def told(hub, name="x"):
    return [(record.version, record.hash, record.description) for record in hub.history(name)]


THREE = [(1, adapter(0).hash, "first"), (2, adapter(1).hash, "second"), (3, adapter(2).hash, "second")]


def test_each_version_keeps_its_content_and_its_record(hub):
    assert told(hub) == THREE
    assert [hub.get("x", version=number).hash for number in (1, 2, 3)] == [adapter(seed).hash for seed in range(3)]
    assert hub["x"].hash == hub.get("x").hash == adapter(2).hash


def test_a_new_version_keeps_the_adapters_place_in_the_order_and_counts_as_one_adapter(hub):
    assert [record.name for record in hub] == ["before", "x", "after"]
    assert len(hub) == 3
    assert hub.record("x") == hub.history("x")[-1]


def test_fields_that_nobody_gives_stay_as_they_were(hub):
    assert [record.tags for record in hub.history("x")] == [("t",)] * 3
    assert hub.record("x").description == "second"
    assert hub.add(adapter(3, card={"tags": ["from the card"]}), replace=True).tags == ("from the card",)


def test_without_replace_other_content_is_refused_and_the_way_out_is_named(hub):
    with pytest.raises(AdapterExists, match="replace=True"):
        hub.add(adapter(5))
    assert told(hub) == THREE


def test_the_newest_content_again_makes_no_version(hub):
    generation = hub.generation
    assert hub.add(adapter(2), replace=True) == hub.record("x")
    assert hub.generation == generation
    assert told(hub) == THREE


def test_a_rollback_is_a_version_of_its_own_with_the_old_content_and_fields(hub):
    record = hub.rollback("x", 1)
    assert (record.version, record.restored, record.hash, record.description) == (4, 1, adapter(0).hash, "first")
    assert told(hub) == [*THREE, (4, adapter(0).hash, "first")]
    assert hub["x"].hash == adapter(0).hash
    assert hub.rollback("x", 1) == record
    assert hub.add(adapter(6), replace=True).restored is None
    assert hub.rollback("x", 5) == hub.record("x")
    assert hub.record("x").version == 5


@pytest.mark.parametrize("version", [0, 4, -1, True, "1"])
def test_a_version_that_is_not_there_is_a_key_error_that_names_those_that_are(hub, version):
    for act in (lambda: hub.get("x", version=version), lambda: hub.rollback("x", version)):
        with pytest.raises(AdapterNotFound, match=r"'x' has no version .*; it has 1, 2, 3"):
            act()
    for act in (hub.history, hub.prune, lambda name: hub.rollback(name, 1)):
        with pytest.raises(KeyError, match="did you mean 'after'"):
            act("aftre")


def test_pruning_keeps_the_newest_versions_and_their_numbers(hub):
    assert hub.prune("x", keep=2) == 1
    assert told(hub) == THREE[1:]
    with pytest.raises(AdapterNotFound, match="it has 2, 3"):
        hub.get("x", version=1)
    assert hub.prune("x") == 1
    assert hub.prune("x", keep=9) == 0
    assert hub.add(adapter(4), replace=True).version == 4
    for keep in (0, -1, True, 1.5):
        with pytest.raises(HubError, match=f"keep is {keep!r}"):
            hub.prune("x", keep=keep)


def test_gc_keeps_what_a_version_needs_and_takes_what_none_does(hub):
    assert hub.gc() == 0
    sizes = {record.version: record.size_bytes for record in hub.history("x")}
    hub.prune("x", keep=2)
    assert hub.gc() == sizes[1]
    assert hub.get("x", version=2).hash == adapter(1).hash
    hub.remove("x")
    assert hub.gc() == sizes[2] + sizes[3]
    assert hub.verify().ok
    assert [record.name for record in hub] == ["before", "after"]


def test_versions_follow_a_rename_and_go_with_the_adapter(hub):
    hub.rename("x", "y")
    assert told(hub, "y") == THREE
    assert {record.name for record in hub.history("y")} == {"y"}
    assert hub.get("y", version=1).name == "y"
    assert hub.rollback("y", 2).name == "y"
    hub.remove("y")
    assert hub.add(adapter(0, "y")).version == 1
    assert len(hub.history("y")) == 1


def test_an_update_changes_the_newest_version_in_place(hub):
    hub.update("x", description="better", language="de")
    assert [record.description for record in hub.history("x")] == ["first", "second", "better"]
    assert [record.language for record in hub.history("x")] == [(), (), ("de",)]


def test_content_that_several_versions_and_names_share_is_stored_once(hub):
    hub.rollback("x", 1)
    hub.add(adapter(0), name="twin")
    assert len(list(hub.path.glob("blobs/*/*"))) == 5
    hub.remove("twin")
    hub.prune("x")
    hub.gc()
    assert hub["x"].hash == adapter(0).hash


def test_two_writers_that_replace_at_once_make_two_versions(hub):
    with Hub(hub.path) as other:
        other.add(adapter(7), replace=True)
        hub.add(adapter(8), replace=True)
        assert [entry[0] for entry in told(other)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE versions SET record = replace(record, 'first', 'worst') WHERE version = 1", "sha256"),
        ("UPDATE versions SET version = 9 WHERE version = 1", "its version 9 has the record of 1"),
        ("UPDATE versions SET hash = (SELECT hash FROM adapters WHERE seq = 1) WHERE version = 1", "column hash"),
        ("DELETE FROM versions WHERE version = 1", r"rows of 1 superseded versions, but 2 were added"),
    ],
)
def test_a_version_changed_behind_the_hubs_back_is_found_and_gc_deletes_nothing(hub, statement, message):
    run_sql(hub.path, statement)
    report = hub.verify()
    assert len(report.problems) == 1
    assert report.intact == ("before", "x", "after")
    with pytest.raises(HubCorrupt, match=message):
        hub.gc()
    assert len(list(hub.path.glob("blobs/*/*"))) == 5
    assert hub["x"].hash == adapter(2).hash


def test_a_damaged_blob_of_an_old_version_is_found_and_adding_it_again_heals_it(hub):
    path = blob_path(hub.path, adapter(0).hash)
    flip(path)
    assert [problem.split(":")[0] for problem in hub.verify().problems] == ["version 1 of adapter 'x'"]
    with pytest.raises(AdapterCorrupt):
        hub.get("x", version=1)
    hub.add(adapter(0), name="elsewhere")
    assert hub.verify().ok
    assert hub.get("x", version=1).hash == adapter(0).hash


def test_a_rebuilt_catalogue_has_every_version(hub):
    hub.rollback("x", 1)
    hub.close()
    assert rebuild(hub.path) == ["before", "x", "after"]
    with Hub(hub.path) as again:
        assert told(again) == [*THREE, (4, adapter(0).hash, "first")]
        assert again.verify().problems == ()


def test_without_any_catalogue_the_versions_come_back_from_what_the_blobs_know(hub):
    hub.close()
    (hub.path / "catalogue.sqlite").unlink()
    assert sorted(rebuild(hub.path)) == ["after", "before", "x"]
    with Hub(hub.path) as again:
        assert told(again) == THREE
        assert again.verify().ok
        assert again.gc() == 0


def test_when_the_newest_row_is_damaged_a_rebuilt_catalogue_has_the_versions_before_and_the_content(hub):
    hub.close()
    run_sql(hub.path, "UPDATE adapters SET record = replace(record, 'org/base', 'org/bose') WHERE name = 'x'")
    rebuild(hub.path)
    with Hub(hub.path) as again:
        assert told(again) == THREE[:2]
        assert {record.hash for record in again} >= {adapter(2).hash, adapter(1).hash}
        assert again.verify().ok


def test_a_hub_of_schema_1_opens_with_all_it_had_and_a_backup(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", migrations.STEPS[:1])
        connection = sqlite3.connect(tmp_path / "catalogue.sqlite", isolation_level=None)
        migrations.migrate(connection, tmp_path / "catalogue.sqlite")
    with Hub(tmp_path / "source") as source:
        source.add(adapter(0), description="from before")
        source.add(adapter(1, "other"))
    (tmp_path / "source" / "blobs").rename(tmp_path / "blobs")
    # rows as schema 1 wrote them: without version, restored and language
    connection.execute("ATTACH ? AS source", (str(tmp_path / "source" / "catalogue.sqlite"),))
    connection.execute("INSERT INTO blobs SELECT * FROM source.blobs")
    for name, digest, text in connection.execute("SELECT name, hash, record FROM source.adapters ORDER BY seq").fetchall():
        old = as_schema_1(text)
        connection.execute(
            "INSERT INTO adapters (name, hash, record, sha256) VALUES (?, ?, ?, ?)", (name, digest, old, sha256(old))
        )
    connection.execute("UPDATE state SET num_adapters = 2, generation = 5")
    connection.close()
    with Hub(tmp_path) as hub:
        assert (tmp_path / "catalogue.sqlite.v1.backup").is_file()
        assert [(record.name, record.version, record.language) for record in hub] == [("x", 1, ()), ("other", 1, ())]
        assert hub.record("x").description == "from before"
        assert hub["x"].hash == adapter(0).hash
        assert hub.generation == 5
        hub.add(adapter(2), replace=True)
        assert [record.version for record in hub.history("x")] == [1, 2]
        assert hub.verify().problems == ()
        assert hub.gc() == 0


def as_schema_1(text):
    data = json.loads(text)
    for key in ("version", "restored", "language"):
        del data[key]
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()
