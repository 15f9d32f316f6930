import sqlite3

import pytest

from loraweave.errors import HubCorrupt
from loraweave.hub.hub import Hub
from loraweave.hub.stores import migrations

NEWEST = len(migrations.STEPS)
NEXT_STEP = ("ALTER TABLE state ADD COLUMN colour TEXT", "UPDATE state SET colour = 'green'")


def version(path):
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA user_version").fetchone()[0]
    finally:
        connection.close()


@pytest.fixture
def path(tmp_path):
    with Hub(tmp_path / "hub"):
        return tmp_path / "hub" / "catalogue.sqlite"


def edit(path, *statements):
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_a_new_catalogue_has_the_newest_schema(path):
    assert version(path) == len(migrations.STEPS)


def test_an_older_catalogue_is_copied_then_brought_up_to_date(path, monkeypatch):
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, NEXT_STEP))
    edit(path, "UPDATE state SET generation = 7")
    with Hub(path.parent) as hub:
        assert hub.generation == 7
    assert version(path) == NEWEST + 1
    backup = path.with_name(f"catalogue.sqlite.v{NEWEST}.backup")
    assert version(backup) == NEWEST
    connection = sqlite3.connect(backup)
    assert connection.execute("SELECT generation FROM state").fetchone() == (7,)
    connection.close()


def test_a_step_that_fails_leaves_the_older_catalogue_in_use(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", (*migrations.STEPS, (NEXT_STEP[0], "SELECT * FROM nowhere")))
        with pytest.raises(HubCorrupt, match="nowhere"):
            Hub(path.parent)
    assert version(path) == NEWEST
    connection = sqlite3.connect(path)
    assert "colour" not in [row[1] for row in connection.execute("PRAGMA table_info(state)")]
    connection.close()
    with Hub(path.parent) as hub:
        assert len(hub) == 0


def test_a_newer_catalogue_is_refused_with_both_versions_and_not_touched(path):
    edit(path, "PRAGMA user_version = 99", "PRAGMA wal_checkpoint(TRUNCATE)")
    before = path.read_bytes()
    with pytest.raises(HubCorrupt, match=rf"schema 99.*up to {NEWEST}"):
        Hub(path.parent)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_not_touched(tmp_path):
    edit(tmp_path / "catalogue.sqlite", "CREATE TABLE bookmarks (url)")
    before = (tmp_path / "catalogue.sqlite").read_bytes()
    with pytest.raises(HubCorrupt, match="another program"):
        Hub(tmp_path)
    assert (tmp_path / "catalogue.sqlite").read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "catalogue.sqlite").write_bytes(b"what is this?" * 1000)
    with pytest.raises(HubCorrupt, match="not a database"):
        Hub(tmp_path)


def test_the_catalogue_is_synced_in_full_and_never_checkpoints_by_itself_or_maps_memory(tmp_path):
    with Hub(tmp_path) as hub, hub._catalogue.reading() as connection:
        settings = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "wal_autocheckpoint", "mmap_size", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "wal_autocheckpoint": 0, "mmap_size": 0, "foreign_keys": 1}
