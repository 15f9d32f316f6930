"""Files of large search indexes, which later processes map instead of reading every key from the catalogue.

A file is named arrays in safetensors, written in blocks, with the digest of each array. It lies in the hub's index/, or in
the cache if the hub is read-only, and is always checked: a file that is damaged or of another form is made again.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from loraweave.extend import cache_folder, text_digest, whole_file
from loraweave.extend.hubs import STALE_TMP_S, Keys, Segment, Stamp

Choice = Callable[[int], Any]

_logger = logging.getLogger(__name__)

# fewer keys are read from the catalogue in some milliseconds
MIN_SAVED = 1000

_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
_MAX_HEADER_BYTES = 2**20
_ALIGNMENT = 64
_BLOCK_BYTES = 2**24

# smaller arrays are compared with their digests on every read, which takes up to 20 ms
CHECKED_BYTES = 2**25


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write {name: array} and the metadata to a temporary file, sync it and rename it to `path`; an error leaves no file."""
    table: dict[str, Any] = {}
    end = 0
    # the format allows no gaps: wide numbers first, so that every array begins at a multiple of its numbers' size
    arrays = dict(sorted(arrays.items(), key=lambda entry: (-entry[1].itemsize, -entry[1].nbytes)))
    for name, array in arrays.items():
        kind = next(kind for kind, dtype in _DTYPES.items() if array.dtype == np.dtype(dtype))
        table[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary, ThreadPoolExecutor(1) as hashing:
        # the digests have one length, so that the arrays have their places before the digests are known
        digests = hashing.submit(lambda: {name: _digest(array) for name, array in arrays.items()})
        with temporary.open("xb") as file:
            file.write(_header(table, metadata, dict.fromkeys(arrays, "0" * 64)))
            for array in arrays.values():
                for block in _blocks(array):
                    file.write(block)
            file.seek(0)
            file.write(_header(table, metadata, digests.result()))
        temporary.chmod(0o444)


def _header(table: Mapping[str, Any], metadata: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    text = json.dumps({**table, "__metadata__": {"loraweave": json.dumps({**metadata, "sha256": digests}, sort_keys=True)}})
    padded = text.encode() + b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded


def map_arrays(path: Path, *, all_digests: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return (metadata, arrays mapped from the file, not writeable). Raises ValueError or OSError for an incomplete file.

    Arrays above 32 MB are checked against their digests only with `all_digests`, since that reads them and mapping does not.
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


# to be increased when the meaning of the arrays changes
_FORMAT = 1


def load(places: Sequence[Path], wanted: Stamp, dim: int, choice: Choice) -> tuple[Keys, Stamp] | None:
    """Return (keys, stamp) of the newest file in the folders `places` for the embedder and index in `wanted` and `choice`.

    The keys are mapped from the file. Returns None without a file, or if it is damaged or in another format.
    """
    saved = [_load(folder, wanted, dim, choice) for folder in places]
    return max(filter(None, saved), key=lambda one: one[1].generation, default=None)


def save(place: Path, stamp: Stamp, keys: Keys) -> Keys | None:
    """Save the search keys (adapters' vectors) of one segment in the folder `place`; return them mapped from the file.

    Named by `stamp`. Returns None, without an error, for keys that are few or mapped, and where a file cannot be written.
    """
    (segment,) = keys.segments
    if len(keys) < MIN_SAVED or not segment.keys_ND.flags.writeable:
        return None
    path = _path(place, stamp)
    metadata = {**vars(stamp), "format": _FORMAT, "dim": keys.dim, "kind": type(segment.index).__name__}
    try:
        if cache_folder() in place.parents:
            # only the cache's folder is made: a hub's own folder that was deleted stays deleted
            place.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.unfinished"):
            if time.time() - left.stat().st_mtime >= STALE_TMP_S:
                left.unlink(missing_ok=True)
        write_arrays(path, {"seqs": segment.seqs_N, **segment.index.arrays()}, metadata)
    except OSError as error:
        _logger.info("the search index is not saved: %s", error)
        return None
    opened = _load(place, stamp, keys.dim, keys.choice)
    return opened[0] if opened is not None and opened[1] == stamp else None


def problems(place: Path) -> Iterator[str]:
    """Yield a sentence for each damaged index file of the hub in the folder `place`."""
    for path in sorted((place / "index").glob("*.safetensors")):
        try:
            map_arrays(path, all_digests=True)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            yield f"the search index {path} is damaged ({error}); delete it, and the next search makes it again"


def _path(folder: Path, stamp: Stamp) -> Path:
    return folder / "index" / f"{text_digest(repr((stamp.embedder, stamp.index)))[:32]}.safetensors"


def _load(folder: Path, wanted: Stamp, dim: int, choice: Choice) -> tuple[Keys, Stamp] | None:
    path = _path(folder, wanted)
    try:
        metadata, arrays = map_arrays(path)
        stamp = Stamp(*(metadata[name] for name in ("identity", "generation", "embedder", "index")))
        form = (metadata["format"], metadata["dim"], stamp.embedder, stamp.index)
        if form != (_FORMAT, dim, wanted.embedder, wanted.index):
            raise ValueError(f"it is of format {metadata['format']}, {metadata['dim']} dimensions and {stamp.embedder!r}")
        if type(stamp.generation) is not int or type(stamp.identity) is not str:
            raise ValueError(f"its generation is {stamp.generation!r:.40}")
        seqs_N = arrays.pop("seqs")
        if seqs_N.ndim != 1 or seqs_N.dtype != np.int64 or not len(seqs_N) or (np.diff(seqs_N) <= 0).any():
            raise ValueError("its seqs do not ascend")
        kind = choice(len(seqs_N))
        if kind.__name__ != metadata["kind"]:
            arrays = {"vectors": arrays["vectors"]}
        index = kind.from_arrays(dim, arrays)
        if len(index) != len(seqs_N):
            raise ValueError(f"it has {len(index)} keys for {len(seqs_N)} adapters")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _logger.info("the search index %s is made again: %s", path, error)
        return None
    return Keys(dim, choice, (Segment(seqs_N, index),)), stamp
