import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from loraweave.common import files
from loraweave.hub.search import segments
from loraweave.hub.search.segments import map_arrays, write_arrays

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
