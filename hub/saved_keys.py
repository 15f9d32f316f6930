"""A search index as a file below a hub's index/, or in the cache: several processes map it, and it is never the truth."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loraweave.hub.array_files import map_arrays, write_arrays
from loraweave.hub.cache_folder import cache_folder
from loraweave.hub.keys import Choice, Keys, Segment
from loraweave.hub.stores.blob_files import STALE_TMP_S, remove_file
from loraweave.hub.stores.open_stores import local_folder

# another number for another meaning of the arrays
_FORMAT = 1

# fewer keys are read from the catalogue in some milliseconds
MIN_SAVED = 1000

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stamp:
    """What a saved index is an index of: the catalogue, its generation, what made the keys, and the index asked for."""

    identity: str
    generation: int
    embedder: str
    index: str


def places(folder: Path, *, writable: bool) -> tuple[Path, ...]:
    """Where the index of the hub in a folder may be saved; the last of them is where it is written.

    That of a hub that cannot be written is kept in the cache: its readers may still find one beside the hub.
    """
    return (folder,) if writable else (folder, local_folder(str(folder.absolute())))


def index_path(folder: Path, embedder: str, index: str) -> Path:
    """The file for keys of that embedder."""
    return folder / "index" / f"{hashlib.sha256(repr((embedder, index)).encode()).hexdigest()[:32]}.safetensors"


def save(folder: Path, keys: Keys, stamp: Stamp) -> bool:
    """Whether the keys, which are one segment, were saved. A folder that is full is no error."""
    (segment,) = keys.segments
    path = index_path(folder, stamp.embedder, stamp.index)
    metadata = {**vars(stamp), "format": _FORMAT, "dim": keys.dim, "kind": type(segment.index).__name__}
    try:
        if cache_folder() in folder.parents:
            # a hub's own folder that is gone stays so
            folder.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        write_arrays(path, {"seqs": segment.seqs_N, **segment.index.arrays()}, metadata)
    except OSError as error:
        _logger.info("the search index is not saved: %s", error)
        return False
    return True


def load(folder: Path, embedder: str, index: str, dim: int, choice: Choice) -> tuple[Keys, Stamp] | None:
    """The saved keys and what they are of. None when there are none, or for a file that is damaged or of another form."""
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
        found = kind.from_arrays(dim, arrays)
        if len(found) != len(seqs_N):
            raise ValueError(f"it has {len(found)} keys for {len(seqs_N)} adapters")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _logger.info("the search index %s is made anew: %s", path, error)
        return None
    return Keys(dim, choice, (Segment(seqs_N, found),)), stamp


def problems(folder: Path) -> Iterator[str]:
    """What is damaged below index/, one sentence each."""
    for path in sorted((folder / "index").glob("*.safetensors")):
        try:
            map_arrays(path, all_digests=True)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            yield f"the search index {path} is damaged ({error}); delete it, and the next search makes it anew"


def _sweep(folder: Path) -> None:
    for path in folder.glob("*.unfinished"):
        if time.time() - path.stat().st_mtime >= STALE_TMP_S:
            remove_file(path)
