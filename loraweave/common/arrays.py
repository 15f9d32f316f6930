"""Named arrays in one safetensors file, written in blocks and mapped when read, with the digest of each array."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loraweave.common.files import whole_file

_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
_MAX_HEADER_BYTES = 2**20
_ALIGNMENT = 64
_BLOCK_BYTES = 2**24

# smaller arrays are compared with their digests on every read, which takes up to 20 ms
CHECKED_BYTES = 2**25


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes and syncs a temporary file, then renames it to `path`; an error leaves nothing behind."""
    header: dict[str, Any] = {}
    end = 0
    # the format allows no gaps: wide numbers first, so that every array begins at a multiple of its numbers' size
    arrays = dict(sorted(arrays.items(), key=lambda entry: (-entry[1].itemsize, -entry[1].nbytes)))
    for name, array in arrays.items():
        kind = next(kind for kind, dtype in _DTYPES.items() if array.dtype == np.dtype(dtype))
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    digests = {name: _digest(array) for name, array in arrays.items()}
    header["__metadata__"] = {"loraweave": json.dumps({**metadata, "sha256": digests}, sort_keys=True)}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                for block in _blocks(array):
                    file.write(block)
        temporary.chmod(0o444)


def map_arrays(path: Path, *, all_digests: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, arrays mapped from the file, not writeable). Raises ValueError or OSError for an incomplete file.

    Arrays above 32 MB are checked against their digests only on request, since that reads them and mapping does not.
    """
    table, metadata, start = _read_header(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    arrays = {}
    for name, (dtype, shape, begin, end) in table.items():
        if start + end > len(mapped):
            raise ValueError(f"array {name!r:.60} ends at byte {start + end} of a file of {len(mapped)}")
        # a plain array: every slice of a memmap costs microseconds
        arrays[name] = np.frombuffer(mapped, dtype, math.prod(shape), start + begin).reshape(shape)
        if (all_digests or arrays[name].nbytes <= CHECKED_BYTES) and _digest(arrays[name]) != metadata["sha256"][name]:
            raise ValueError(f"array {name!r:.60} is damaged: its sha256 is not the stored one")
    return metadata, arrays


Table = dict[str, tuple[str, tuple[int, ...], int, int]]


def _read_header(path: Path) -> tuple[Table, dict[str, Any], int]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size} bytes, above the limit of {_MAX_HEADER_BYTES}")
        text = file.read(size)
    try:
        header = json.loads(text)
        metadata = json.loads(header.pop("__metadata__")["loraweave"])
        table = {name: _entry(name, entry) for name, entry in header.items()}
        if set(metadata["sha256"]) != set(table):
            raise ValueError("its arrays and their digests have different names")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not that of saved arrays ({type(error).__name__}: {error})") from error
    return table, metadata, 8 + size


def _entry(name: str, entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    if not all(type(number) is int and 0 <= number < 2**62 for number in (*shape, begin, end)) or len(shape) > 2:
        raise ValueError(f"array {name!r:.60} has the shape {shape!r:.60} at {begin!r:.30} to {end!r:.30}")
    if end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"array {name!r:.60} of shape {shape} has {end - begin} bytes")
    return dtype, shape, begin, end


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for block in _blocks(array):
        digest.update(block)
    return digest.hexdigest()


def _blocks(array: np.ndarray) -> list[memoryview]:
    # an array without entries has no memory to view
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
    return [flat[start : start + _BLOCK_BYTES] for start in range(0, len(flat), _BLOCK_BYTES)]
