"""Workers that read what is added to a hub, and what it verifies: the hub and the report are those of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_hubs
from installed import require_entry
from warm_workers import warm_workers as warm_workers

from loraweave.errors import AdapterExists, LoraweaveError
from loraweave.extensions.cluster import reading
from loraweave.hub import adding
from loraweave.hub.adding import Addition
from loraweave.hub.hub import Hub
from loraweave.hub.stores.blobs import read_blob
from loraweave.hub.stores.folder_blobs import blob_path
from loraweave.hub.stores.storing import store

MANY = [tiny_hubs.adapter(number, f"a{number}", card={"tags": [f"seed {number}"]}) for number in range(6)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(adding, "MAX_BATCH", 4)


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as opened:
        yield opened


@pytest.fixture
def folders(tmp_path):
    """Adapters of which one is broken, one asks for the name of another, and one has the content of another."""
    (tmp_path / "of" / "broken").mkdir(parents=True)
    for place, one in (*enumerate(MANY[:6]), ("more", MANY[2])):
        one.save_pretrained(tmp_path / "of" / str(place))
    more = [tmp_path / "of" / "broken", Addition(tmp_path / "of" / "4", name="a1"), tmp_path / "of" / "more"]
    return [*(tmp_path / "of" / str(place) for place in range(5)), *more, tmp_path / "of" / "5"]


def all_but_the_time(hub, added):
    records = [replace(record, created="") for aside in (False, True) for record in hub.records(quarantined=aside)]
    origins = [{**read_blob(blob_path(hub.path, one.hash), "it").origin, "created": ""} for one in records]
    return records, origins, [(label, str(error)) for label, error in added.refused], hub.verify()


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize(("n_jobs", "policy"), [(1, "refuse"), (1, "quarantine"), (2, "report")])
def test_workers_that_read_leave_the_hub_of_one_process(hub, tmp_path, folders, monkeypatch, n_jobs, policy):
    if policy != "report":
        require_entry("examiners", "anomalies")
    monkeypatch.setattr(reading, "PIECE", 2)
    with Hub(tmp_path / "other") as other:
        alone = all_but_the_time(other, other.add_many(folders, anomalies=policy))
    assert all_but_the_time(hub, hub.add_many(folders, anomalies=policy, n_jobs=n_jobs)) == alone
    records, origins, refused, verification = alone
    assert [label for label, _ in refused][:2] == [str(tmp_path / "of" / "broken"), "a1"]
    assert not verification.orphans
    assert [bool(one["anomalies"]) for one in origins] == [bool(record.anomalies) for record in records]


def read_by_a_worker(hub, *sources):
    own = {"stored_as": "factors", "allow_pickle": False, "measured": False}
    return reading.read_piece(hub, sources, **own)


def store_batch(hub, *batch):
    return [type(error) for _, error in store(hub._catalogue, hub._blobs, batch, stored_as="factors", as_version=False)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("batches", [[(0, 1)], [(0,), (1,)]])
def test_a_blob_has_the_record_that_is_stored_whichever_worker_writes_it_first(hub, tmp_path, folders, order, batches):
    sources = (tmp_path / "of" / "2", tmp_path / "of" / "more")
    read = {}
    for place in order:
        (read[place],) = read_by_a_worker(hub, Addition(sources[place]))
    for batch in batches:
        assert store_batch(hub, *(read[place] for place in batch)) == [type(None)] * len(batch)
    assert read_blob(blob_path(hub.path, hub.record("a2").hash), "it").origin["source"][0] == str(sources[0])
    assert hub.verify().ok


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_blob_keeps_its_record_when_another_of_its_content_is_refused(hub, tmp_path, folders, order, is_there):
    if is_there:
        hub.add(tmp_path / "of" / "1")
    sources = [
        (Addition(tmp_path / "of" / "4"),),
        (Addition(tmp_path / "of" / "1"), Addition(tmp_path / "of" / "4", name="a1")),
    ]
    read = {place: read_by_a_worker(hub, *sources[place]) for place in order}
    assert store_batch(hub, *read[1]) == [type(None), AdapterExists]
    assert store_batch(hub, *read[0]) == [type(None)]
    assert read_blob(blob_path(hub.path, hub.record("a4").hash), "it").origin["name"] == "a4"
    assert hub.verify().ok


def test_what_a_worker_wrote_of_an_adapter_that_is_then_refused_is_removed(hub, folders):
    added = hub.add_many([folders[1], Addition(folders[2], name="a1"), folders[3]], n_jobs=1)
    assert [type(error) for _, error in added.refused] == [AdapterExists]
    assert not blob_path(hub.path, MANY[2].hash).exists()
    assert hub.verify().orphans == ()


def test_a_piece_that_is_larger_than_memory_may_hold_is_stored_in_parts(hub, folders, monkeypatch):
    sources = [Addition(folders[place]) for place in (0, 5, 1)]
    monkeypatch.setattr(reading, "MAX_BATCH_BYTES", 1)
    first, broken, second = read_by_a_worker(hub, *sources)
    assert isinstance(broken, LoraweaveError)
    assert [one.read(hub._blobs).hash for one in (first, second)] == [MANY[0].hash, MANY[1].hash]
    assert [one.origin for one in (first, second)] == [first.record, second.record]


@pytest.mark.usefixtures("warm_workers")
def test_two_processes_find_what_one_finds(hub, monkeypatch):
    for seed in range(3):
        hub.add(tiny_hubs.adapter(seed))
    monkeypatch.setattr(reading, "MANY", 1)
    tiny_hubs.flip(blob_path(hub.path, hub.record("adapter 0").hash))
    blob_path(hub.path, hub.record("adapter 2").hash).unlink()
    found = hub.verify()
    assert hub.verify(n_jobs=2) == found
    assert [problem.split(":")[0] for problem in found.problems] == ["adapter 'adapter 0'", "adapter 'adapter 2'"]
    assert found.intact == ("adapter 1",)
