"""Every system call and every SQL statement of a change fails in turn; the hub is then what it was, and a retry works."""

import errno
import os
import resource
import sqlite3
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import loraweave.common.files
import loraweave.hub.stores.catalogue
import loraweave.hub.stores.folder_blobs
from loraweave.errors import HubError, HubFull, HubReadOnly
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.types import Factors


def adapter(seed):
    generator = torch.Generator().manual_seed(seed)
    factors = Factors(torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator))
    return Adapter(f"adapter {seed}", "org/base", {"layer": factors})


class Countdown:
    """Calls `fail` at the n-th step."""

    def __init__(self, steps, fail):
        self.left, self.fail, self.last = steps, fail, None

    def step(self, what):
        self.left -= 1
        if self.left == 0:
            self.last = what
            self.fail(what)


class FaultyOs:
    """The module `os`, whose changing calls count as steps."""

    STEPS = ("mkdir", "open", "write", "fsync", "fchmod", "replace")

    def __init__(self, countdown):
        self.countdown = countdown

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.STEPS:
            return real

        def counted(*args, **kwargs):
            self.countdown.step(name)
            return real(*args, **kwargs)

        return counted


@contextmanager
def faulty(monkeypatch, countdown):
    class Connection(sqlite3.Connection):
        def execute(self, statement, *args):
            # a ROLLBACK belongs to the handling of the fault
            if not statement.startswith("ROLLBACK"):
                countdown.step(statement)
            return super().execute(statement, *args)

    real = sqlite3.connect
    with monkeypatch.context() as patch:
        for module in (loraweave.hub.stores.folder_blobs, loraweave.common.files):
            patch.setattr(module, "os", FaultyOs(countdown))
        patch.setattr(
            loraweave.hub.stores.catalogue.sqlite3, "connect", lambda *args, **kw: real(*args, **kw, factory=Connection)
        )
        yield


SQLITE_CODES = {
    errno.ENOSPC: sqlite3.SQLITE_FULL,
    errno.EIO: sqlite3.SQLITE_IOERR,
    errno.EROFS: sqlite3.SQLITE_READONLY,
}


def raise_os(number):
    def fail(what):
        if what not in FaultyOs.STEPS:
            error = sqlite3.OperationalError("as SQLite reports it")
            error.sqlite_errorcode = SQLITE_CODES[number]
            raise error
        raise OSError(number, os.strerror(number))

    return fail


def interrupt(what):
    raise KeyboardInterrupt


def state(path):
    with Hub(path) as hub:
        assert hub.verify().problems == ()
        assert list((path / "tmp").glob("*")) == []
        rows = [(record.name, record.version, record.hash, record.description) for record in hub]
        return rows, sorted(hub.vectors("e"))


CHANGES = {
    "add": lambda hub: hub.add(adapter(2), description="new"),
    "update": lambda hub: hub.update("adapter 0", description="new"),
    "rename": lambda hub: hub.rename("adapter 0", "new"),
    "remove": lambda hub: hub.remove("adapter 0"),
    "replace": lambda hub: hub.add(adapter(7), name="adapter 0", replace=True),
    "rollback": lambda hub: hub.rollback("adapter 1", 1),
    "store_vectors": lambda hub: hub.store_vectors("e", [("adapter 1", "d", np.ones(3))]),
    "gc": lambda hub: hub.gc(),
}


FAULTS = {
    "full": (raise_os(errno.ENOSPC), HubFull),
    "io": (raise_os(errno.EIO), HubError),
    "read only": (raise_os(errno.EROFS), HubReadOnly),
    "interrupt": (interrupt, KeyboardInterrupt),
}


@pytest.mark.parametrize(
    ("change", "fault"), [*[(change, "io") for change in CHANGES], *[("add", fault) for fault in FAULTS if fault != "io"]]
)
def test_a_change_that_fails_at_any_step_changes_nothing_and_can_be_repeated(tmp_path, monkeypatch, change, fault):
    fail, expected = FAULTS[fault]
    path = tmp_path / "hub"
    with Hub(path) as hub:
        for seed in (0, 1):
            hub.add(adapter(seed))
        hub.add(adapter(6), name="adapter 1", replace=True)
        hub.store_vectors("e", [("adapter 0", "d", np.ones(3))])
    before = state(path)
    blobs = sorted((path / "blobs").glob("*/*"))
    for step in range(1, 1000):
        countdown = Countdown(step, fail)
        try:
            with faulty(monkeypatch, countdown), Hub(path) as hub:
                CHANGES[change](hub)
        except expected:
            assert state(path) == before, countdown.last
            if expected is HubFull:
                assert sorted((path / "blobs").glob("*/*")) == blobs, countdown.last
        else:
            break
    assert step > 10
    # emptying the log is an economy: gc passes over its failure
    assert countdown.last is None or (change == "gc" and countdown.last.startswith("PRAGMA busy_timeout"))
    assert state(path) != before or change == "gc"


def test_a_full_database_is_named_and_leaves_the_hub_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "hub"
    with Hub(path) as hub:
        hub.add(adapter(0))
    before = state(path)
    real = sqlite3.connect

    def small(*args, **kwargs):
        connection = real(*args, **kwargs)
        connection.execute("PRAGMA max_page_count = 20")
        return connection

    with monkeypatch.context() as patch, Hub(path) as hub:
        hub.close()
        patch.setattr(loraweave.hub.stores.catalogue.sqlite3, "connect", small)
        with Hub(path) as full, pytest.raises(HubFull, match=r"adding adapter 'adapter 1'.*nothing was changed") as caught:
            full.add(adapter(1), description="x" * 90_000)
    assert isinstance(caught.value, OSError)
    assert state(path) == before
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

    class Full(Countdown):
        def step(self, what):
            if what.startswith("DELETE"):
                raise_os(errno.ENOSPC)(what)

    with faulty(monkeypatch, Full(0, None)), Hub(tmp_path) as hub:
        assert hub.gc() > 0
    with Hub(tmp_path) as hub:
        assert hub.verify().ok
        assert len(list(tmp_path.glob("blobs/*/*"))) == 1
        hub.add(adapter(0))
        assert hub["adapter 0"].hash == adapter(0).hash


def test_a_write_in_pieces_is_put_together(tmp_path, monkeypatch):
    class Slow(FaultyOs):
        def __getattr__(self, name):
            return (lambda fd, data: os.write(fd, data[:7])) if name == "write" else getattr(os, name)

    monkeypatch.setattr(loraweave.hub.stores.folder_blobs, "os", Slow(None))
    with Hub(tmp_path) as hub:
        hub.add(adapter(0))
        assert hub["adapter 0"].hash == adapter(0).hash
        assert hub.verify().ok


def test_a_disk_that_turns_read_only_is_named(tmp_path, monkeypatch):
    with Hub(tmp_path) as hub:
        countdown = Countdown(1, raise_os(errno.EROFS))
        for module in (loraweave.hub.stores.folder_blobs, loraweave.common.files):
            monkeypatch.setattr(module, "os", FaultyOs(countdown))
        with pytest.raises(HubReadOnly, match="cannot be written"):
            hub.add(adapter(0))
        assert len(hub) == 0
