from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from loraweave import registry
from loraweave.common import files
from loraweave.hub.search import segments
from loraweave.hub.search import segments as keys_module
from loraweave.hub.search.segments import Keys, map_arrays, write_arrays

DIM = 6


def flat(count):
    return registry.get("indexes", "flat")


def unit_rows(seed, count):
    rows = np.random.default_rng(seed).normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_hand(truth, query, k):
    """Python's sort over (-score, seq)."""
    scores = {seq: round(sum(float(a) * float(b) for a, b in zip(query, key, strict=True)), 6) for seq, key in truth.items()}
    return sorted(scores, key=lambda seq: (-scores[seq], seq))[:k]


def seqs_of(keys, query, k, **options):
    return [found.seqs_K.tolist() for found in keys.search(query, k, **options)]


@pytest.mark.parametrize("seed", range(4))
def test_after_any_changes_a_search_gives_what_a_sort_of_all_keys_gives(seed, monkeypatch):
    monkeypatch.setattr(keys_module, "MAX_LATE", 25)
    rng = np.random.default_rng(seed)
    keys, truth, following = Keys(DIM, flat), {}, 1
    for step in range(60):
        gone = rng.choice(sorted(truth) or [0], size=min(len(truth), int(rng.integers(3))), replace=False)
        moved = rng.choice(sorted(truth) or [0], size=min(len(truth), int(rng.integers(3))), replace=False)
        added = np.arange(following, following + int(rng.integers(6)))
        following += len(added)
        new = np.union1d(np.setdiff1d(moved, gone), added)
        # a few directions, so that scores tie
        vectors = unit_rows(7, 9)[rng.integers(9, size=len(new))]
        keys = keys.changed(gone, new, vectors)
        truth = {seq: key for seq, key in truth.items() if seq not in gone} | dict(zip(new.tolist(), vectors, strict=True))
        assert len(keys) == len(truth)
        if step % 6 == 0 and truth:
            query = unit_rows(step, 2)
            for k in (1, 5, 99):
                assert seqs_of(keys, query, k) == [by_hand(truth, one, k) for one in query]
            allowed = np.array(sorted(truth)[:: int(rng.integers(1, 4))])
            some = {seq: truth[seq] for seq in allowed.tolist()}
            assert seqs_of(keys, query, 4, allowed_seqs=allowed) == [by_hand(some, one, 4) for one in query]


def test_a_key_found_is_the_one_that_was_given():
    vectors = unit_rows(0, 5)
    keys = (
        Keys(DIM, flat).changed(np.empty(0, int), np.arange(5), vectors).changed(np.array([2]), np.array([7]), -vectors[:1])
    )
    (found,) = keys.search(vectors[:1], 9)
    for seq, key in zip(found.seqs_K.tolist(), found.keys_KD, strict=True):
        np.testing.assert_array_equal(key, -vectors[0] if seq == 7 else vectors[seq])


def test_no_keys_and_keys_that_are_all_gone_find_nothing():
    query = unit_rows(1, 3)
    empty = Keys(DIM, flat)
    gone = empty.changed(np.empty(0, int), np.arange(4), unit_rows(0, 4)).changed(np.arange(4), np.empty(0, int), query[:0])
    for keys in (empty, gone):
        assert len(keys) == 0
        assert seqs_of(keys, query, 3) == [[], [], []]


def test_single_additions_leave_few_segments_and_the_large_one_untouched():
    keys = Keys(DIM, flat).changed(np.empty(0, int), np.arange(900), unit_rows(0, 900))
    first = keys.segments[0]
    for seq in range(900, 1500):
        keys = keys.changed(np.empty(0, int), np.array([seq]), unit_rows(seq, 1))
        assert len(keys.segments) <= 12
        assert keys.segments[0] is first


def test_when_the_late_ones_are_many_all_become_one_segment_again():
    keys = Keys(DIM, flat).changed(np.empty(0, int), np.arange(900), unit_rows(0, 900))
    keys = keys.changed(np.arange(10), np.arange(900, 2000), unit_rows(1, 1100))
    (only,) = keys.segments
    assert only.seqs_N.tolist() == list(range(10, 2000))
    assert only.alive_N is None


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

    monkeypatch.setattr(files.os, "fsync", full)
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
    monkeypatch.setattr(segments, "CHECKED_BYTES", 0)
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
