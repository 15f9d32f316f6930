"""A large search index is a file that several processes map, and that is never believed blindly."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from counted_words import WORDS, Counts
from safetensors.numpy import load_file
from searched_hubs import adapter, add_new, filled, names, reads
from tiny_hubs import flip

from loraweave.common import files as common_files
from loraweave.extensions.large_hubs import index_files
from loraweave.extensions.large_hubs.index_files import map_arrays, write_arrays
from loraweave.hub.hub import Hub
from loraweave.hub.indexes import flat
from loraweave.hub.search import search as search_module
from loraweave.hub.search.search import SearchIndex


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(index_files, "MIN_SAVED", 1)
    monkeypatch.setattr(flat, "FEW_KEYS", 1)
    with Hub(tmp_path / "hub") as opened:
        yield filled(opened)


def files(hub):
    return sorted((hub.path / "index").iterdir())


ARRAYS = {
    "half": np.arange(21, dtype="<f2").reshape(3, 7),
    "long": np.arange(5, dtype="<i8"),
    "single": np.linspace(0, 1, 11, dtype="<f4"),
    "none": np.empty((0, 7), "<f4"),
}


def written(tmp_path, arrays=ARRAYS):
    path = tmp_path / "index" / "x.safetensors"
    write_arrays(path, arrays, {"a": 1, "b": "ä"})
    return path


def test_arrays_and_metadata_come_back_mapped_and_not_writeable(tmp_path):
    path = written(tmp_path)
    metadata, arrays = map_arrays(path, all_digests=True)
    assert (metadata["a"], metadata["b"]) == (1, "ä")
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert (arrays[name].dtype, arrays[name].flags.writeable) == (array.dtype, False)
        assert arrays[name].flags.aligned


def test_safetensors_reads_the_file_too(tmp_path):
    found = load_file(written(tmp_path))
    assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())


def test_what_is_mapped_survives_a_newer_file_in_its_place(tmp_path):
    path = written(tmp_path)
    arrays = map_arrays(path)[1]
    write_arrays(path, {"long": np.zeros(3, "<i8")}, {})
    assert arrays["long"].tolist() == [0, 1, 2, 3, 4]
    assert map_arrays(path)[1]["long"].tolist() == [0, 0, 0]


def test_an_error_while_writing_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch):
    path = written(tmp_path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "no space left")

    monkeypatch.setattr(common_files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_arrays(path, {"long": np.zeros(3, "<i8")}, {})
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_every_byte_that_is_cut_off_and_any_that_is_flipped_in_the_data_is_noticed(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    damaged = tmp_path / "damaged"
    for size in range(len(data)):
        damaged.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"."):
            map_arrays(damaged)
    begin = 8 + int.from_bytes(data[:8], "little")
    for place in range(begin, len(data)):
        damaged.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(ValueError, match="is damaged: its sha256"):
            map_arrays(damaged)


def test_large_arrays_are_compared_with_their_digests_on_request_only(tmp_path, monkeypatch):
    monkeypatch.setattr(index_files, "CHECKED_BYTES", 0)
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    map_arrays(path)
    with pytest.raises(ValueError, match="is damaged"):
        map_arrays(path, all_digests=True)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F64"},
        {"shape": [2**40, 2**40]},
        {"shape": [-1]},
        {"shape": [5.0]},
        {"shape": [1, 1, 5]},
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [-8, 32]},
        {"data_offsets": [0]},
        {"data_offsets": "ab"},
    ],
)
def test_a_header_that_promises_what_the_file_has_not_is_refused(tmp_path, change):
    path = written(tmp_path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["long"] |= change
    text = json.dumps(header).encode()
    hostile = tmp_path / "hostile"
    hostile.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(ValueError, match=r"."):
        map_arrays(hostile)


@pytest.mark.parametrize("text", [b"[]", b"{}", b"[" * 10**5, b'{"__metadata__": {"loraweave": "[]"}}', b"\xff"])
def test_a_header_of_another_form_is_refused(tmp_path, text):
    path = tmp_path / "x"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=r"."):
        map_arrays(path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="1099511627776 bytes, above the limit"):
        map_arrays(path)


def test_another_process_maps_the_saved_index_and_reads_only_what_changed_since(hub, monkeypatch):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    hub.remove("cat")
    asked = reads(hub, monkeypatch)
    with Hub(hub.path) as other:
        index = SearchIndex(other, embedder=Counts())
        assert names(index, "dog", k=9) == ["dog", "sum", "film", "word"]
    assert asked[0][0] > 0
    assert sum(number for _, number in asked) == 1


def test_the_saved_index_is_one_file_for_an_embedder_and_a_kind_of_index(hub):
    for options in ({}, {"index": "flat"}, {"embedder": Counts("others")}):
        names(SearchIndex(hub, **({"embedder": Counts()} | options)), "cat")
    assert len(files(hub)) == 3
    hub.add(adapter("new", 9), examples=["cat cat dog"])
    names(SearchIndex(hub, embedder=Counts()), "cat")
    assert len(files(hub)) == 3


def behind(data, mark, new):
    """The data with `new` in place of what stands behind the mark."""
    at = data.index(mark) + len(mark)
    return data[:at] + new + data[at + len(new) :]


DAMAGES = {
    "cut": lambda data: data[:-9],
    "flipped": lambda data: data[:-3] + bytes([data[-3] ^ 64]) + data[-2:],
    "other format": lambda data: data.replace(b'\\"format\\": 1', b'\\"format\\": 9'),
    "other size": lambda data: data.replace(b'\\"dim\\": 5', b'\\"dim\\": 6'),
    "other catalogue": lambda data: behind(data, b'\\"identity\\": \\"', b"0" * 32),
    "from the future": lambda data: behind(data, b'\\"generation\\": ', b"9"),
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_file_that_is_damaged_foreign_or_missing_is_made_again(hub, damage):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    (path,) = files(hub)
    before = path.read_bytes()
    path.unlink()
    if DAMAGES[damage] is not None:
        path.write_bytes(damaged := DAMAGES[damage](before))
        assert damaged != before
    with Hub(hub.path) as other:
        embedder = Counts()
        index = SearchIndex(other, embedder=embedder)
        assert [names(index, word)[0] for word in WORDS] == list(WORDS)
        # of the stored vectors, not of the texts
        assert embedder.seen == list(WORDS)
    assert files(hub) == [path]
    assert len(path.read_bytes()) == len(before)


def test_verify_names_a_damaged_index_file(hub):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    assert hub.verify().ok
    (path,) = files(hub)
    flip(path, -3)
    (problem,) = hub.verify().problems
    assert str(path) in problem
    assert "made" not in problem.split(";")[0]


def test_a_catalogue_put_back_from_a_copy_gets_its_own_index(hub, tmp_path):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    hub.close()
    shutil.copytree(hub.path, tmp_path / "copy")
    with Hub(hub.path) as first:
        for number in range(3):
            first.add(adapter(f"more {number}", 20 + number), examples=["cat dog"])
        search_module_names = names(SearchIndex(first, embedder=Counts()), "cat dog", k=3)
    assert search_module_names == [f"more {number}" for number in range(3)]
    shutil.rmtree(tmp_path / "copy" / "index")
    shutil.copytree(hub.path / "index", tmp_path / "copy" / "index")
    with Hub(tmp_path / "copy") as second:
        # as many generations on, but with another content
        while second.generation < 30:
            second.update("cat", description=f"film {second.generation}")
        assert set(names(SearchIndex(second, embedder=Counts()), "cat dog", k=9)) == set(WORDS)


def test_the_index_of_a_read_only_hub_is_saved_in_the_cache_and_mapped_by_the_next_process(hub, monkeypatch):
    monkeypatch.setattr(Hub, "writable", property(lambda self: False))
    assert names(SearchIndex(hub, embedder=Counts()), "cat") == ["cat"]
    assert not (hub.path / "index").exists()
    asked = reads(hub, monkeypatch)
    with Hub(hub.path) as other:
        assert names(SearchIndex(other, embedder=Counts()), "dog") == ["dog"]
    assert [(since > 0, number) for since, number in asked] == [(True, 0)]


def test_a_read_only_hub_is_searched_by_the_newer_of_its_own_index_and_the_caches(hub, monkeypatch):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    add_new(hub)
    monkeypatch.setattr(search_module, "MAX_LATE", 2)
    asked = reads(hub, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "writable", property(lambda self: False))
        for _ in range(2):
            assert names(SearchIndex(hub, embedder=Counts()), "cat cat dog", k=3) == ["new 0", "new 1", "new 2"]
    # the first follows three changes, the second nothing
    assert sum(number for _, number in asked) == 3
    assert len(files(hub)) == 1


def test_a_process_that_follows_many_changes_saves_the_index_for_the_next(hub, monkeypatch):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    add_new(hub)
    monkeypatch.setattr(search_module, "MAX_LATE", 2)
    asked = reads(hub, monkeypatch)
    for _ in range(2):
        with Hub(hub.path) as other:
            assert names(SearchIndex(other, embedder=Counts()), "cat cat dog", k=3) == ["new 0", "new 1", "new 2"]
    assert sum(number for _, number in asked) == 3


def test_an_index_that_cannot_be_saved_is_used_from_memory(hub, monkeypatch):
    def full(*arguments):
        raise OSError(28, "no space left")

    monkeypatch.setattr(index_files, "write_arrays", full)
    assert names(SearchIndex(hub, embedder=Counts()), "cat") == ["cat"]
