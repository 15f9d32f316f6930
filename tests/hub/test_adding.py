import errno
import os
from dataclasses import replace
from functools import partial

import pytest
import tiny_hubs
import torch

from loraweave import registry
from loraweave.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    AdapterUnsupported,
    HubError,
    HubFull,
    PackageMissing,
)
from loraweave.hub import adding
from loraweave.hub.adapter import Adapter
from loraweave.hub.adding import Addition
from loraweave.hub.hub import Hub
from loraweave.hub.stores import folder_blobs
from loraweave.hub.stores.folder_blobs import blob_path
from loraweave.types import Factors


def adapter(name, seed):
    return tiny_hubs.adapter(seed, name, card={"tags": [f"seed {seed}"]})


MANY = [adapter(f"a{number}", number) for number in range(9)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(adding, "MAX_BATCH", 4)


def whatever_the_time(records):
    return [(r.name, r.hash, r.base_model, r.tags, r.license, r.description, r.size_bytes) for r in records]


def test_many_at_once_are_what_they_are_one_by_one(hub, tmp_path):
    added = hub.add_many(iter(MANY))
    assert [record.name for record in added.records] == [one.name for one in MANY]
    assert not added.refused
    with Hub(tmp_path / "other") as other:
        for one in MANY:
            other.add(one)
        assert whatever_the_time(hub) == whatever_the_time(other) == whatever_the_time(added.records)
        for one in MANY:
            path = blob_path(hub.path, one.hash)
            assert torch.equal(hub[one.name].layers["layer"].a_RI, one.layers["layer"].a_RI)
            assert os.stat(path).st_mode == os.stat(blob_path(other.path, one.hash)).st_mode
    assert hub.verify().ok
    assert not list((hub.path / "tmp").iterdir())


def test_what_is_refused_is_told_with_its_reason_and_the_rest_is_added(hub, tmp_path):
    hub.add(adapter("a1", 50))
    nothing = Adapter("zero", "base", {"layer": Factors(torch.zeros(2, 5), torch.zeros(4, 2))})
    broken = Adapter("nan", "base", {"layer": Factors(torch.full((2, 5), torch.nan), torch.ones(4, 2))})
    added = hub.add_many([MANY[0], MANY[1], nothing, broken, tmp_path / "nowhere", MANY[2]])
    assert [record.name for record in added.records] == ["a0", "a2"]
    refused = {label: type(error) for label, error in added.refused}
    assert refused == {
        "a1": AdapterExists,
        "zero": AdapterUnsupported,
        "nan": AdapterCorrupt,
        str(tmp_path / "nowhere"): AdapterNotFound,
    }
    assert hub.verify().ok


def test_names_and_fields_can_be_given_for_each_and_folders_are_read(hub, tmp_path):
    MANY[3].save_pretrained(tmp_path / "folder")
    added = hub.add_many([Addition(MANY[0], name="first", license="mit", tags=["x"]), tmp_path / "folder"])
    assert [(r.name, r.license, r.tags) for r in added.records] == [("first", "MIT", ("x",)), ("a3", None, ("seed 3",))]
    assert hub["a3"].hash == MANY[3].hash


def test_the_same_content_in_a_batch_is_stored_once_under_both_names(hub):
    added = hub.add_many([MANY[0], Addition(MANY[0], name="again"), MANY[0]])
    assert [record.name for record in added.records] == ["a0", "again", "a0"]
    assert len(list((hub.path / "blobs").glob("*/*"))) == 1
    assert len(hub) == 2


@pytest.mark.parametrize("n_jobs", [None, 1])
def test_those_of_one_content_keep_the_files_that_each_came_with(hub, tmp_path, n_jobs):
    for text in ("one", "two"):
        replace(MANY[0], name=text, files={"tokenizer.json": text.encode()}).save_pretrained(tmp_path / text)
    hub.add_many([tmp_path / "one", tmp_path / "two"], n_jobs=n_jobs)
    assert {name: bytes(hub[name].files["tokenizer.json"]) for name in ("one", "two")} == {"one": b"one", "two": b"two"}
    assert hub.verify().ok


def test_of_two_contents_for_one_name_in_a_batch_the_first_has_it_or_they_are_versions(hub):
    both = [adapter("same", 1), adapter("same", 2)]
    added = hub.add_many(both)
    assert [record.hash for record in added.records] == [both[0].hash]
    assert isinstance(added.refused[0][1], AdapterExists)
    assert [record.version for record in hub.add_many(both[1:], replace=True).records] == [2]
    assert [record.hash for record in hub.history("same")] == [one.hash for one in both]
    hub.gc()
    assert hub.verify().ok


def test_what_is_there_already_is_not_written_again_and_a_damaged_blob_is_replaced(hub):
    hub.add_many(MANY)
    paths = {one.name: blob_path(hub.path, one.hash) for one in MANY}
    times = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    paths["a5"].chmod(0o644)
    paths["a5"].write_bytes(b"x")
    generation = hub.generation
    assert len(hub.add_many(MANY).records) == len(hub) == 9
    assert hub.generation == generation + 1
    assert {
        name for name, time in times.items() if blob_path(hub.path, hub.record(name).hash).stat().st_mtime_ns != time
    } == {"a5"}
    assert hub.verify().ok


@pytest.mark.parametrize(("call", "limit"), [("replace", 6), ("fsync", 12), ("write", 6)])
def test_a_batch_that_fails_is_not_there_at_all_and_a_second_call_goes_on(hub, monkeypatch, call, limit):
    original, calls = getattr(os, call), []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > limit:
            raise OSError(errno.EIO, "the disk is gone")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folder_blobs.os, call, failing)
        with pytest.raises(HubError, match="adding 4 adapters"):
            hub.add_many(MANY)
    assert len(hub) == 4
    assert hub.verify().ok
    assert len(hub.add_many(MANY).records) == len(hub) == 9
    assert hub.verify().ok


def test_a_full_disk_leaves_no_blob_of_the_batch(hub, monkeypatch):
    hub.add(MANY[0])

    def full(*arguments):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(folder_blobs, "sync", full)
        with pytest.raises(HubFull, match="no space left"):
            hub.add_many(MANY[1:4])
    assert [path.stem for path in (hub.path / "blobs").glob("*/*")] == [MANY[0].hash]
    assert not list((hub.path / "tmp").iterdir())
    assert [record.name for record in hub] == ["a0"]


def test_all_blobs_of_a_batch_are_there_and_synced_before_its_rows(hub, monkeypatch):
    events = []
    for call in ("fsync", "replace"):
        original = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *a, c=call, o=original: (events.append(c), o(*a))[1])
    transaction = hub._catalogue.transaction

    def watched(doing):
        events.append("rows")
        return transaction(doing)

    monkeypatch.setattr(hub._catalogue, "transaction", watched)
    hub.add_many(MANY[:4])
    before = events[: events.index("rows")]
    assert before[:4] == ["fsync"] * 4
    assert before[4:8] == ["replace"] * 4
    # the folder of each, blobs/ and the hub's own
    assert before[8:] == ["fsync"] * (len({one.hash[:2] for one in MANY[:4]}) + 2)
    assert events.count("rows") == 1


def test_nothing_to_add_adds_nothing(hub):
    added = hub.add_many([])
    assert (added.records, added.refused, hub.generation) == ((), (), 0)


def test_progress_goes_to_the_terminal_and_not_to_the_output(hub, capsys):
    assert len(hub.add_many(MANY[:2], progress=True).records) == 2
    assert capsys.readouterr().out == ""


def test_a_store_that_fails_while_an_adapter_is_looked_over_is_told_and_no_adapter_is_blamed(hub, monkeypatch):
    real, looked_over = adding.examine, []

    def failing(catalogue, blobs, one, *rest):
        looked_over.append(one.record.name)
        if len(looked_over) == 3:
            raise HubError("reading the hub: stale file handle")
        return real(catalogue, blobs, one, *rest)

    monkeypatch.setattr(adding, "examine", failing)
    with pytest.raises(HubError, match="stale"):
        hub.add_many(MANY)
    assert len(hub) == 0
    assert len(hub.add_many(MANY).records) == len(MANY)


def test_a_policy_that_nothing_installed_can_keep_is_refused_and_nothing_is_stored(hub, monkeypatch):
    monkeypatch.setattr(adding, "examiners", list)
    for policy in ("quarantine", "refuse", {"duplicate": "refuse"}):
        with pytest.raises(AdapterUnsupported, match="nothing installed here looks for anomalies"):
            hub.add(MANY[0], anomalies=policy)
    assert len(hub) == 0
    assert hub.add(MANY[0]).anomalies == hub.add(MANY[1], anomalies="off").anomalies == ()


@pytest.mark.parametrize("n_jobs", [2, -2])
def test_workers_are_refused_by_name_where_no_extension_has_them_read(hub, tmp_path, monkeypatch, n_jobs):
    MANY[0].save_pretrained(tmp_path / "a0")
    monkeypatch.setattr(registry, "brought", lambda part: {})
    for call in (partial(hub.add_many, [tmp_path / "a0"]), hub.verify):
        with pytest.raises(PackageMissing, match=r"reading by workers, .* is done by none .*: pass n_jobs=1"):
            call(n_jobs=n_jobs)
    assert len(hub) == 0
    assert [record.name for record in hub.add_many([tmp_path / "a0"], n_jobs=1).records] == ["a0"]
    assert hub.verify(n_jobs=1).intact == ("a0",)
    assert [record.name for record in hub.add_many([MANY[1]], n_jobs=n_jobs).records] == ["a1"]
