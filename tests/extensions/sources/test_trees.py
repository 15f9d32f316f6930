"""A tree of folders into the hub: every adapter once, whatever interrupts the walk, and a reason for each that stays out."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile

import pytest
from tiny_hubs import adapter

from loraweave.errors import AdapterNotFound, HubFull
from loraweave.extensions.sources import add_tree
from loraweave.extensions.sources import trees as module
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as opened:
        yield opened


@pytest.fixture
def tree(tmp_path):
    """Three adapters, an archive with one more, one that is damaged, and what is none."""
    root = tmp_path / "tree"
    for seed, path in enumerate(("plural", "finance/de/sum", "finance/en/sum")):
        adapter(seed).save_pretrained(root / path)
    packed = adapter(3).save_pretrained(tmp_path / "packed")
    with zipfile.ZipFile(root / "finance" / "last.zip", "w") as archive:
        for file in packed.iterdir():
            archive.write(file, f"inside/{file.name}")
    shutil.copytree(root / "plural", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"broken")
    (root / "notes").mkdir()
    (root / "notes" / "readme.txt").write_text("nothing")
    return root


def states(report):
    return {entry.path: entry.state for entry in report.entries}


ADDED = {
    "broken": "refused",
    "finance/de/sum": "added",
    "finance/en/sum": "added",
    "finance/last.zip": "added",
    "plural": "added",
}


@pytest.fixture
def read(monkeypatch):
    """The sources that were read."""
    found = []
    original = Adapter.from_pretrained

    def reading(source, **keywords):
        found.append(source.name)
        return original(source, **keywords)

    monkeypatch.setattr(module.Adapter, "from_pretrained", reading)
    return found


def test_every_adapter_of_the_tree_is_added_under_its_path(hub, tree):
    report = add_tree(hub, tree, tags=["bulk"])
    assert states(report) == ADDED
    assert {record.name: record.hash for record in hub} == {
        "finance/de/sum": adapter(1).hash,
        "finance/en/sum": adapter(2).hash,
        "finance/last": adapter(3).hash,
        "plural": adapter(0).hash,
    }
    assert {record.tags for record in hub} == {("bulk",)}


def test_a_tree_that_workers_read_is_that_of_one_process(hub, tree, tmp_path):
    with Hub(tmp_path / "other") as other:
        alone, found = add_tree(other, tree), add_tree(hub, tree, n_jobs=1)
        assert found == alone
        assert [(record.name, record.hash, record.source) for record in hub] == [
            (record.name, record.hash, record.source) for record in other
        ]
    assert add_tree(hub, tree, n_jobs=1).counts() == {"present": 4, "refused": 1}


def test_what_is_refused_is_told_with_the_reason(hub, tree):
    report = add_tree(hub, tree)
    [refused] = report.of("refused")
    assert refused.path == "broken"
    assert refused.why.startswith("AdapterCorrupt: ")
    assert report.counts() == {"added": 4, "refused": 1}
    assert json.loads(json.dumps(report.to_json()))["entries"][0]["why"] == refused.why


def test_a_second_walk_reads_nothing_and_adds_nothing(hub, tree, read):
    add_tree(hub, tree)
    read.clear()
    generation = hub.generation
    report = add_tree(hub, tree)
    assert read == []
    assert hub.generation == generation
    assert states(report) == {path: "refused" if path == "broken" else "present" for path in ADDED}
    assert report.of("refused")[0].why.startswith("AdapterCorrupt: ")


def test_an_interrupted_walk_goes_on_with_the_rest(hub, tree, read, monkeypatch):
    original = Hub.add_many

    def interrupted(self, *words, **keywords):
        if len(self) == 2:
            raise KeyboardInterrupt
        return original(self, *words, **keywords)

    monkeypatch.setattr(module, "MAX_BATCH", 3)
    monkeypatch.setattr(Hub, "add_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_tree(hub, tree)
    monkeypatch.setattr(Hub, "add_many", original)
    read.clear()
    report = add_tree(hub, tree)
    assert read == ["last.zip", "plural"]
    assert report.counts() == {"added": 2, "present": 2, "refused": 1}


def test_without_its_notes_a_second_walk_gives_the_same_hub(hub, tree):
    add_tree(hub, tree)
    before = hub.records()
    shutil.rmtree(hub.path / "trees")
    assert add_tree(hub, tree).counts() == {"present": 4, "refused": 1}
    assert hub.records() == before


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe{", b'{"path": 3}\n[1]\nnull\n{"a":', b"x" * 300_000])
def test_damaged_notes_cost_a_reading_and_no_more(hub, tree, damage):
    add_tree(hub, tree)
    [notes] = (hub.path / "trees").iterdir()
    notes.write_bytes(damage)
    assert add_tree(hub, tree).counts() == {"present": 4, "refused": 1}


def test_what_was_repaired_is_read_again(hub, tree):
    add_tree(hub, tree)
    shutil.copy(tree / "plural" / "adapter_model.safetensors", tree / "broken")
    assert states(add_tree(hub, tree))["broken"] == "added"
    assert hub["broken"].hash == adapter(0).hash


def test_what_was_changed_becomes_the_next_version(hub, tree):
    add_tree(hub, tree)
    shutil.rmtree(tree / "plural")
    adapter(9).save_pretrained(tree / "plural")
    assert states(add_tree(hub, tree))["plural"] == "updated"
    assert hub["plural"].hash == adapter(9).hash
    assert [record.version for record in hub.history("plural")] == [1, 2]


def test_what_was_removed_from_the_hub_is_added_again(hub, tree):
    add_tree(hub, tree)
    hub.remove("plural")
    assert states(add_tree(hub, tree))["plural"] == "added"


def test_a_name_that_stands_for_another_adapter_is_left_alone(hub, tree):
    hub.add(adapter(7), name="plural")
    [entry] = [entry for entry in add_tree(hub, tree).entries if entry.path == "plural"]
    assert entry.state == "added"
    assert entry.name.startswith("plural~")
    assert hub["plural"].hash == adapter(7).hash
    assert hub[entry.name].hash == adapter(0).hash
    assert states(add_tree(hub, tree))["plural"] == "present"


def test_a_folder_and_an_archive_of_one_name_get_two(hub, tree):
    adapter(8).save_pretrained(tree / "finance" / "last")
    names = {entry.path: entry.name for entry in add_tree(hub, tree).entries}
    assert names["finance/last"] == "finance/last"
    assert names["finance/last.zip"].startswith("finance/last.zip~") or names["finance/last.zip"].startswith("finance/last~")
    assert hub[names["finance/last.zip"]].hash == adapter(3).hash


def test_names_do_not_depend_on_what_was_walked_before(tmp_path, tree):
    found = []
    for walks in (1, 2):
        with Hub(tmp_path / f"hub{walks}") as one:
            for _ in range(walks):
                add_tree(one, tree, prefix="all/")
            found.append([(record.name, record.hash) for record in one])
    assert found[0] == found[1]
    assert {name.partition("/")[0] for name, _ in found[0]} == {"all"}


def test_a_path_that_can_be_no_name_gets_a_like_one(hub, tmp_path):
    root = tmp_path / "odd"
    for seed, path in enumerate(("a\nb", f"{'x' * 150}/{'y' * 150}", " spaced ", os.fsdecode(b"\xff"))):
        adapter(seed).save_pretrained(root / path)
    report = add_tree(hub, root)
    assert report.counts() == {"added": 4}
    assert "a_b" in hub
    assert max(len(record.name) for record in hub) <= 200
    assert add_tree(hub, root).counts() == {"present": 4}


def test_a_tree_takes_a_transaction_for_each_batch(hub, tree, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH", 3)
    before = hub.generation
    assert add_tree(hub, tree).counts() == {"added": 4, "refused": 1}
    assert hub.generation == before + 2


def test_a_refusal_that_the_hub_decided_is_tried_again(hub, tree):
    hub.add(adapter(0), name="other")
    report = add_tree(hub, tree, anomalies={"duplicate": "refuse"})
    assert {entry.path for entry in report.of("refused")} == {"broken", "plural"}
    assert "AdapterSuspicious" in next(entry.why for entry in report.entries if entry.path == "plural")
    hub.remove("other")
    assert states(add_tree(hub, tree, anomalies={"duplicate": "refuse"}))["plural"] == "added"


def test_what_looks_wrong_is_told_beside_what_was_added(hub, tree):
    hub.add(adapter(0), name="other")
    entries = {entry.path: entry for entry in add_tree(hub, tree, anomalies={"duplicate": "quarantine"}).entries}
    assert entries["plural"].state == "added"
    assert entries["plural"].why == "in quarantine: duplicate: it has the content of 'other'"
    assert [record.name for record in hub.records(quarantined=True)] == ["plural"]


def test_links_are_not_followed(hub, tree, tmp_path):
    adapter(5).save_pretrained(tmp_path / "outside")
    (tree / "linked").symlink_to(tmp_path / "outside")
    (tree / "loop").symlink_to(tree)
    (tree / "linked.zip").symlink_to(tree / "finance" / "last.zip")
    assert states(add_tree(hub, tree)) == ADDED


def test_a_dry_run_names_everything_and_changes_nothing(hub, tree, read):
    report = add_tree(hub, tree, dry_run=True)
    assert report.counts() == {"found": 5}
    assert [entry.name for entry in report.entries][1:3] == ["finance/de/sum", "finance/en/sum"]
    assert (len(hub), read, (hub.path / "trees").exists()) == (0, [], False)


def test_what_is_wrong_with_the_hub_ends_the_walk(hub, tree, monkeypatch):
    def full(*words, **keywords):
        raise HubFull("no space left")

    monkeypatch.setattr(Hub, "add_many", full)
    with pytest.raises(HubFull):
        add_tree(hub, tree)


def test_a_tree_without_adapters_is_told(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterNotFound, match=r"at or below .*empty"):
        add_tree(hub, tmp_path / "empty")
    with pytest.raises(AdapterNotFound, match="not a folder"):
        add_tree(hub, tmp_path / "nowhere")


def test_a_folder_that_cannot_be_listed_is_told(hub, tree, monkeypatch):
    scandir = os.scandir

    def closed(path):
        # as for everybody but root where the folder's mode is 0
        if str(path).endswith("notes"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    [entry] = [entry for entry in add_tree(hub, tree).entries if entry.path == "notes"]
    assert (entry.state, "cannot be read" in entry.why) == ("refused", True)
