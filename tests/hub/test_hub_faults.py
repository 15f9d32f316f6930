"""Every system call and every SQL statement of a change fails in turn; the hub is then what it was, and a retry works."""

import errno
import os
import resource
import sqlite3
from contextlib import contextmanager

import pytest
from tiny_hubs import CHANGES, Steps, adapter, fill, state

import loraweave.common.files
from loraweave.errors import HubError, HubFull, HubReadOnly
from loraweave.hub.hub import Hub

SQLITE_CODES = {
    errno.ENOSPC: sqlite3.SQLITE_FULL,
    errno.EIO: sqlite3.SQLITE_IOERR,
    errno.EROFS: sqlite3.SQLITE_READONLY,
}


@contextmanager
def faulty(monkeypatch, steps):
    with monkeypatch.context() as patch:
        steps.install(patch.setattr)
        yield


def raise_os(number):
    def fail(what):
        # a call of the system is in lower case, a statement is not
        if not what.islower():
            error = sqlite3.OperationalError("as SQLite reports it")
            error.sqlite_errorcode = SQLITE_CODES[number]
            raise error
        raise OSError(number, os.strerror(number))

    return fail


def interrupt(what):
    raise KeyboardInterrupt


def sound_state(path):
    with Hub(path) as hub:
        found, problems = state(hub)
        assert problems == []
        assert list((path / "tmp").glob("*")) == []
        return found


FAULTS = {
    "full": (raise_os(errno.ENOSPC), HubFull, "no space"),
    "io": (raise_os(errno.EIO), HubError, "the file system failed"),
    "read only": (raise_os(errno.EROFS), HubReadOnly, "cannot be written"),
    "interrupt": (interrupt, KeyboardInterrupt, ""),
}


@pytest.mark.parametrize(
    ("change", "fault"), [*[(change, "io") for change in CHANGES], *[("add", fault) for fault in FAULTS if fault != "io"]]
)
def test_a_change_that_fails_at_any_step_changes_nothing_and_can_be_repeated(tmp_path, monkeypatch, change, fault):
    fail, expected, words = FAULTS[fault]
    path = tmp_path / "hub"
    with Hub(path) as hub:
        fill(hub)
    before = sound_state(path)
    blobs, said = sorted((path / "blobs").glob("*/*")), []
    for step in range(1, 1000):
        steps = Steps(fail, left=step)
        try:
            with faulty(monkeypatch, steps), Hub(path) as hub:
                CHANGES[change](hub)
        except expected as error:
            said.append(str(error))
            assert sound_state(path) == before, steps.last
            if expected is HubFull:
                assert sorted((path / "blobs").glob("*/*")) == blobs, steps.last
        else:
            break
    assert step > 10
    assert [text for text in said if words not in text] == []
    # emptying the log is an economy: gc passes over its failure
    assert steps.last is None or (change == "gc" and steps.last.startswith("PRAGMA busy_timeout"))
    assert sound_state(path) != before or change == "gc"


def test_a_full_database_is_named_and_leaves_the_hub_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "hub"
    with Hub(path) as hub:
        hub.add(adapter(0))
    before = sound_state(path)
    real = sqlite3.connect

    def small(*args, **kwargs):
        connection = real(*args, **kwargs)
        connection.execute("PRAGMA max_page_count = 20")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        with Hub(path) as full, pytest.raises(HubFull, match=r"adding adapter 'adapter 1'.*nothing was changed") as caught:
            full.add(adapter(1), description="x" * 90_000)
    assert isinstance(caught.value, OSError)
    assert sound_state(path) == before
    assert len(list((path / "blobs").glob("*/*"))) == 1
    with Hub(path) as hub:
        hub.add(adapter(1), description="x" * 90_000)
        assert hub["adapter 1"].hash == adapter(1).hash


def test_a_reader_that_finds_no_room_beside_the_catalogue_is_told_so(tmp_path):
    with Hub(tmp_path) as hub:
        hub.add(adapter(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a file that cannot grow, as on a full disk: the one that readers share is made anew by each first of them
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(HubFull, match=r"no space left below .* 32 kB beside a catalogue to read it .*free some space"):
            Hub(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Hub(tmp_path) as hub:
        assert hub["adapter 0"].hash == adapter(0).hash


def test_gc_frees_space_although_the_catalogue_cannot_be_written(tmp_path, monkeypatch):
    with Hub(tmp_path) as hub:
        for seed in (0, 1):
            hub.add(adapter(seed))
        hub.remove("adapter 0")

    class Full(Steps):
        def count(self, what):
            if what.startswith("DELETE"):
                raise_os(errno.ENOSPC)(what)

    with faulty(monkeypatch, Full(None)), Hub(tmp_path) as hub:
        assert hub.gc() > 0
    with Hub(tmp_path) as hub:
        assert hub.verify().ok
        assert len(list(tmp_path.glob("blobs/*/*"))) == 1
        hub.add(adapter(0))
        assert hub["adapter 0"].hash == adapter(0).hash


def test_a_write_in_pieces_is_put_together(tmp_path, monkeypatch):
    class Slow:
        def __getattr__(self, name):
            return (lambda fd, data: os.write(fd, data[:7])) if name == "write" else getattr(os, name)

    monkeypatch.setattr(loraweave.common.files, "os", Slow())
    with Hub(tmp_path) as hub:
        hub.add(adapter(0))
        assert hub["adapter 0"].hash == adapter(0).hash
        assert hub.verify().ok
