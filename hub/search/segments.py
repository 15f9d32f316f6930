"""The keys of a hub's adapters, searchable, as immutable values: a change makes a new value that shares the rest.

Keys lie in segments, the oldest and largest first. Changed keys become a small segment, and the rows they replace are masked
in theirs; segments of like size are joined, so that n changes cost n log n and leave log n segments. When the small ones are
a large share of all, all become one segment again, which can be saved as a file and mapped by several processes.

Such a file is named arrays in safetensors, written in blocks, with the digest of each array.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loraweave.common.files import cache_folder, remove_file, whole_file
from loraweave.common.names import text_digest
from loraweave.hub.indexes._vectors import Choice, Index
from loraweave.hub.stores.folder_blobs import STALE_TMP_S
from loraweave.hub.stores.open_stores import local_folder

_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
_MAX_HEADER_BYTES = 2**20
_ALIGNMENT = 64
_BLOCK_BYTES = 2**24

# smaller arrays are compared with their digests on every read, which takes up to 20 ms
CHECKED_BYTES = 2**25


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write and sync a temporary file, then rename it to `path`; an error leaves nothing behind."""
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


# above this share, and this number, of small segments' and masked rows all segments become one
MAX_LATE_SHARE = 0.1
MAX_LATE = 1000


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys by ascending seq. `alive_N` is False for rows changed or removed since; None for no such rows."""

    seqs_N: np.ndarray
    index: Index
    alive_N: np.ndarray | None = None

    @property
    def keys_ND(self) -> np.ndarray:
        return self.index.arrays()["vectors"]

    @property
    def num_alive(self) -> int:
        return len(self.seqs_N) if self.alive_N is None else int(self.alive_N.sum())

    def without(self, seqs_M: np.ndarray) -> Segment:
        """Return the segment with these seqs masked."""
        rows_M = self.rows(seqs_M)
        if not len(rows_M):
            return self
        alive_N = np.ones(len(self.seqs_N), bool) if self.alive_N is None else self.alive_N.copy()
        alive_N[rows_M] = False
        return replace(self, alive_N=alive_N)

    def rows(self, seqs_M: np.ndarray) -> np.ndarray:
        """Return the rows of those of the seqs that are in this segment."""
        at_M = np.searchsorted(self.seqs_N, seqs_M)
        inside = at_M < len(self.seqs_N)
        at_M = at_M[inside]
        rows_R: np.ndarray = at_M[self.seqs_N[at_M] == seqs_M[inside]]
        return rows_R


@dataclass(frozen=True, eq=False)
class Hits:
    """The hits of one query: scores descending, the seqs, and the keys; ties by seq."""

    scores_K: np.ndarray
    seqs_K: np.ndarray
    keys_KD: np.ndarray


@dataclass(frozen=True, eq=False)
class Keys:
    """All keys of a hub as of one generation."""

    dim: int
    choice: Choice
    segments: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        return sum(segment.num_alive for segment in self.segments)

    @property
    def num_late(self) -> int:
        """The number of rows that a search reads beyond one unmasked segment: those of later segments, and masked ones."""
        masked = sum(len(segment.seqs_N) - segment.num_alive for segment in self.segments)
        return masked + sum(len(segment.seqs_N) for segment in self.segments[1:])

    def changed(self, seqs_M: np.ndarray, new_seqs_N: np.ndarray, new_keys_ND: np.ndarray) -> Keys:
        """Return the keys without those of `seqs_M`, and with the new ones, whose seqs ascend."""
        if not len(seqs_M) and not len(new_seqs_N):
            return self
        gone_M = np.union1d(seqs_M, new_seqs_N)
        segments = [segment.without(gone_M) for segment in self.segments]
        if len(new_seqs_N):
            segments.append(self._segment(new_seqs_N, new_keys_ND))
        kept = replace(self, segments=tuple(segment for segment in segments if segment.num_alive))
        if kept.num_late > max(MAX_LATE, MAX_LATE_SHARE * len(kept)):
            return kept.joined()
        # the first is not joined here: it is large, and may be a mapped file
        late = list(kept.segments)
        while len(late) > 2 and len(late[-2].seqs_N) <= 2 * len(late[-1].seqs_N):
            late[-2:] = self._join(late[-2:])
        return replace(kept, segments=tuple(late))

    def joined(self) -> Keys:
        """Return the same keys as one segment."""
        return replace(self, segments=tuple(self._join(self.segments)))

    def search(self, query_QD: np.ndarray, k: int, allowed_seqs: np.ndarray | None = None) -> list[Hits]:
        """Return for each query the k best of all keys, or of those with the ascending `allowed_seqs`."""
        parts = []
        for segment in self.segments:
            mask_N = segment.alive_N
            if allowed_seqs is not None:
                mask_N = np.zeros(len(segment.seqs_N), bool)
                mask_N[segment.rows(allowed_seqs)] = True
                mask_N = mask_N if segment.alive_N is None else mask_N & segment.alive_N
            parts.append((segment, *segment.index.search(query_QD, k, allowed_N=mask_N)))
        if not parts:
            nothing = Hits(np.empty(0, np.float32), np.empty(0, np.int64), np.empty((0, self.dim), np.float32))
            return [nothing] * len(query_QD)
        scores_QK = np.concatenate([scores for _, scores, _ in parts], axis=1)
        seqs_QK = np.concatenate([segment.seqs_N[at_QK] for segment, _, at_QK in parts], axis=1)
        keys_QKD = np.concatenate([segment.keys_ND[at_QK] for segment, _, at_QK in parts], axis=1)
        if len(parts) == 1:
            return [Hits(*arrays) for arrays in zip(scores_QK, seqs_QK, keys_QKD, strict=True)]
        best_QK = np.lexsort((seqs_QK, -scores_QK), axis=1)[:, :k]
        return [Hits(s[b], q[b], v[b]) for s, q, v, b in zip(scores_QK, seqs_QK, keys_QKD, best_QK, strict=True)]

    def _join(self, segments: Sequence[Segment]) -> list[Segment]:
        alive = [slice(None) if segment.alive_N is None else segment.alive_N for segment in segments]
        seqs = np.concatenate([np.empty(0, np.int64), *(s.seqs_N[a] for s, a in zip(segments, alive, strict=True))])
        if not len(seqs):
            return []
        keys = np.concatenate([s.keys_ND[a] for s, a in zip(segments, alive, strict=True)])
        if (np.diff(seqs) < 0).any():
            order = np.argsort(seqs)
            seqs, keys = seqs[order], keys[order]
        return [self._segment(seqs, keys)]

    def _segment(self, seqs_N: np.ndarray, keys_ND: np.ndarray) -> Segment:
        arrays: Mapping[str, np.ndarray] = {"vectors": np.ascontiguousarray(keys_ND, np.float32)}
        return Segment(np.ascontiguousarray(seqs_N, np.int64), self.choice(len(seqs_N)).from_arrays(self.dim, arrays))


# raised when the meaning of the arrays changes
_FORMAT = 1

# fewer keys are read from the catalogue in some milliseconds
MIN_SAVED = 1000

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stamp:
    """The identity of a saved index: the catalogue, its generation, the embedder of the keys, and the kind of index."""

    identity: str
    generation: int
    embedder: str
    index: str


def places(folder: Path, *, writable: bool) -> tuple[Path, ...]:
    """Return the folders where the index of a hub in `folder` may be saved; the last of them is where it is written.

    The index of a read-only hub is written to the cache, but its readers may still find one beside the hub.
    """
    return (folder,) if writable else (folder, local_folder(str(folder.absolute())))


def index_path(folder: Path, embedder: str, index: str) -> Path:
    """Return the file of the index for the keys of that embedder."""
    return folder / "index" / f"{text_digest(repr((embedder, index)))[:32]}.safetensors"


def save(folder: Path, keys: Keys, stamp: Stamp) -> bool:
    """Save the keys, which are one segment. Return False, without an error, if that fails, as in a full folder."""
    (segment,) = keys.segments
    path = index_path(folder, stamp.embedder, stamp.index)
    metadata = {**vars(stamp), "format": _FORMAT, "dim": keys.dim, "kind": type(segment.index).__name__}
    try:
        if cache_folder() in folder.parents:
            # only a folder of the cache: a hub's own folder that was deleted stays deleted
            folder.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.unfinished"):
            if time.time() - left.stat().st_mtime >= STALE_TMP_S:
                remove_file(left)
        write_arrays(path, {"seqs": segment.seqs_N, **segment.index.arrays()}, metadata)
    except OSError as error:
        _logger.info("the search index is not saved: %s", error)
        return False
    return True


def load(folder: Path, embedder: str, index: str, dim: int, choice: Choice) -> tuple[Keys, Stamp] | None:
    """Return the saved keys and their stamp; None if there are none, or the file is damaged or of another form."""
    path = index_path(folder, embedder, index)
    try:
        metadata, arrays = map_arrays(path)
        stamp = Stamp(*(metadata[name] for name in ("identity", "generation", "embedder", "index")))
        if (metadata["format"], metadata["dim"], stamp.embedder, stamp.index) != (_FORMAT, dim, embedder, index):
            raise ValueError(f"it is of format {metadata['format']}, {metadata['dim']} dimensions and {stamp.embedder!r}")
        if type(stamp.generation) is not int or type(stamp.identity) is not str:
            raise ValueError(f"its generation is {stamp.generation!r:.40}")
        seqs_N = arrays.pop("seqs")
        if seqs_N.ndim != 1 or seqs_N.dtype != np.int64 or not len(seqs_N) or (np.diff(seqs_N) <= 0).any():
            raise ValueError("its seqs do not ascend")
        kind = choice(len(seqs_N))
        if kind.__name__ != metadata["kind"]:
            arrays = {"vectors": arrays["vectors"]}
        saved_index = kind.from_arrays(dim, arrays)
        if len(saved_index) != len(seqs_N):
            raise ValueError(f"it has {len(saved_index)} keys for {len(seqs_N)} adapters")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _logger.info("the search index %s is made again: %s", path, error)
        return None
    return Keys(dim, choice, (Segment(seqs_N, saved_index),)), stamp


def problems(folder: Path) -> Iterator[str]:
    """Yield a sentence for each damaged file in index/."""
    for path in sorted((folder / "index").glob("*.safetensors")):
        try:
            map_arrays(path, all_digests=True)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            yield f"the search index {path} is damaged ({error}); delete it, and the next search makes it again"
