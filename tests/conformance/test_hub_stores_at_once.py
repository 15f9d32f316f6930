"""What every pair of a catalogue and a place for blobs must do while others read, write and collect."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from store_places import new_place, opened, same
from tiny_hubs import adapter, run_program

import loraweave.hub.stores.blobs
from loraweave.errors import AdapterNotFound, HubLocked

# what another process sees
SHARED = ("sqlite+folder", "sqlite+s3", "postgres+folder", "postgres+s3")
DRIVER = Path(__file__).with_name("store_writers.py")


def once(real, happens):
    """`real`, but at the first call `happens` comes first."""
    waiting = [happens]

    def call(*args, **kwargs):
        while waiting:
            waiting.pop()()
        return real(*args, **kwargs)

    return call


# the moments of a read between the row and the map
MOMENTS = {
    "before the blob is looked for": lambda hub: (hub._blobs, "local"),
    "before it is opened": lambda hub: (loraweave.hub.stores.blobs, "read_blob"),
    "between the two times that safetensors opens it": lambda hub: (torch.UntypedStorage, "from_file"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_who_has_read_a_row_gets_its_bytes_or_adapter_not_found_whenever_gc_comes(place, hub, monkeypatch, moment):
    target, attribute = MOMENTS[moment](hub)

    def read(happens, **options):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, once(getattr(target, attribute), happens))
            return hub.get("x", **options)

    with opened(place) as other:

        def collected(*then):
            other.remove("x")
            assert other.gc() > 0
            for seed in then:
                other.add(adapter(seed), name="x")

        hub.add(adapter(1), name="x")
        assert same(read(lambda: collected(1)), adapter(1))
        assert same(read(lambda: collected(2)), adapter(2))
        hub.add(adapter(3), name="x", replace=True)
        with pytest.raises(AdapterNotFound, match="has no version 1"):
            read(lambda: (other.prune("x"), other.gc()), version=1)
        with pytest.raises(AdapterNotFound, match="no adapter 'x'"):
            read(collected)


def test_verify_does_not_complain_of_what_was_removed_and_collected_meanwhile(place, hub, monkeypatch):
    hub.add(adapter(1), name="x")
    hub.add(adapter(2), name="x", replace=True)
    hub.add(adapter(3))
    with opened(place) as other:
        real = hub._blobs.require
        monkeypatch.setattr(hub._blobs, "require", once(real, lambda: (other.remove("x"), other.gc())))
        found = hub.verify()
    assert (found.problems, found.intact, found.orphans) == ((), ("adapter 3",), ())


def test_a_reader_sees_one_moment(place, hub):
    hub.add(adapter(0))
    with hub._catalogue.reading() as connection:
        counted = connection.execute("SELECT count(*) FROM adapters").fetchone()
        with opened(place) as other:
            other.add(adapter(1))
            assert len(other) == 2
        assert connection.execute("SELECT count(*) FROM adapters").fetchone() == counted
    assert len(hub) == 2


def test_a_second_writer_waits_and_is_told_after_the_time_out(place, hub):
    stored = hub.add(adapter(0))
    with opened(place, timeout_s=0.1) as other, hub._catalogue.locked("holding"):
        with pytest.raises(HubLocked, match=r"adding adapter 'adapter 1': another writer held .*lock.* 0\.1 s") as caught:
            other.add(adapter(1))
        assert isinstance(caught.value, TimeoutError)
        assert list(other) == [stored]
        assert same(other["adapter 0"], adapter(0))
    with opened(place) as other:
        other.add(adapter(1))


def test_threads_share_a_hub(hub):
    failed, before = [], hub.generation

    def work(first):
        try:
            for seed in range(first, first + 4):
                hub.add(adapter(seed))
                assert same(hub[f"adapter {seed}"], adapter(seed))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(record.name for record in hub) == sorted(f"adapter {seed}" for seed in range(12))
    assert hub.generation == before + 12
    assert hub.verify().ok


def test_several_processes_write_read_and_collect_at_once(request, tmp_path):
    places = [new_place(request, tmp_path, stores) for stores in SHARED]
    names = sorted(f"adapter {seed}" for seed in (1, 2, 3, 4, 6, 7, 8, 9, 10, 11))
    assert run_program(DRIVER, json.dumps(places), timeout_s=300) == [[[0, 0, 0, 0], names, []]] * len(SHARED)
