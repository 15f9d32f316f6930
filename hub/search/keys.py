"""The search keys of a hub's adapters: the texts that a key is embedded from, and the searchable collection of all keys.

As in LoraRetriever (Zhao et al. 2024) a key is the mean embedding of sample inputs. Unlike there, keys are scaled to unit
norm: the norm of a mean grows with how alike the samples are, so that it would favour narrow adapters (recall@1 on the
pool's training inputs .49 without, .58 with).

`Keys` are immutable values: a change makes a new value that shares the rest. They lie in segments, the oldest and largest
first. Changed keys become a small segment, and the rows they replace are masked in theirs; segments of like size are joined,
so that n changes cost n log n and leave log n segments. When the small ones are a large share of all, all become one segment
again, which an extension may save as a file for several processes to map.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loraweave.common.display import progress_bar, tracked
from loraweave.common.names import text_digest
from loraweave.hub.embedders._embedder import embed_checked, embedder_of, unit
from loraweave.hub.indexes.flat import Choice, Index
from loraweave.hub.tables.rows import Said
from loraweave.registry import bringing
from loraweave.types import Record

# The description's share of a key: the largest that does not worsen queries by inputs on the pool's training rows. Queries
# by another wording of it find the adapter first in .68 instead of .19 of the cases (benchmarks/retrieval.py).
# 0.5 would give .87, but lose .02 of recall@1 from one input.
DESCRIPTION_WEIGHT = 0.3

# more sample inputs hardly move a mean, but each costs an embedding
MAX_SAMPLE_INPUTS = 50

# the number of adapters whose keys are one piece of work
NUM_SPREAD = 64

# more adapters than these take a second, so that a terminal shows a bar
NUM_SILENT = 8

# the number of adapters whose keys are stored at a time: a first search that is interrupted keeps them
_BATCH = 500

# the objects that have the texts of a key
Spoken = Record | Said

Embed = Callable[[tuple[str, ...]], np.ndarray]


def texts_of(record: Spoken) -> list[tuple[str, str]]:
    """Return the texts of an adapter's key as (kind, text): sample inputs and description, or its name if it has neither."""
    texts = [("sample input", text) for text in record.examples if text.strip()][:MAX_SAMPLE_INPUTS]
    if record.description.strip():
        texts.append(("description", record.description))
    return texts or [("name", record.name)]


def digest_of(record: Spoken) -> str:
    """Return the sha256, in hexadecimal, of a key's texts and weights; a stored key with another digest is outdated."""
    # as json.dumps writes them, in a third of its time
    said = texts_of(record)
    texts = ", ".join(f"[{encode_basestring_ascii(kind)}, {encode_basestring_ascii(text)}]" for kind, text in said)
    return text_digest(f"[{DESCRIPTION_WEIGHT}, [{texts}]]")


def made_keys(embed: Embed, given: Any, records: Sequence[Spoken]) -> Iterator[tuple[Sequence[Spoken], list[np.ndarray]]]:
    """Yield (part of the records, their keys (D,)) from the embedded texts; joblib's workers, if set, embed large parts.

    `given` is the embedder as the user named it, which a worker opens for itself. When all parts have ended, the error of
    the first failed part is raised.
    """
    if len(records) > NUM_SPREAD:
        # imports torch, which a search by another embedder can do without
        from loraweave.common.spread import Failed, processes_here, require_all, spread

        if processes_here(None) is not None:
            parts = [records[start : start + NUM_SPREAD] for start in range(0, len(records), NUM_SPREAD)]
            pieces = {part[0].name: part for part in parts}
            ended = {}
            with progress_bar(sys.stderr.isatty()) as bar:
                for name, outcome in spread(partial(_keys_by, given), pieces, n_jobs=None, label="embedding", bar=bar):
                    ended[name] = outcome
                    if not isinstance(outcome, Failed):
                        yield pieces[name], outcome
            require_all(ended)
            return
    shown = sys.stderr.isatty() and len(records) > NUM_SILENT
    part, made = [], []
    for record in tracked(records, "embedding adapters", total=len(records), shown=shown):
        part.append(record)
        made += _keys_of(embed, [record])
        if len(part) == _BATCH:
            yield part, made
            part, made = [], []
    yield part, made


def _keys_of(embed: Embed, records: Sequence[Spoken]) -> list[np.ndarray]:
    keys = []
    for record in records:
        kinds, texts = zip(*texts_of(record), strict=True)
        rows_ND = embed(texts).astype(np.float64)
        samples_ND = rows_ND[np.array(kinds) == "sample input"]
        key_D = unit(samples_ND.mean(axis=0)) if len(samples_ND) else unit(rows_ND[0])
        if len(samples_ND) and kinds[-1] == "description":
            key_D = unit(key_D + DESCRIPTION_WEIGHT * rows_ND[-1])
        keys.append(key_D)
    return keys


def _keys_by(given: Any, records: Sequence[Spoken]) -> list[np.ndarray]:
    """Return the records' keys by an embedder; a worker opens a named embedder only once."""
    return _keys_of(partial(embed_checked, _embedder_named(given) if isinstance(given, str) else given), records)


_embedder_named = lru_cache(maxsize=1)(embedder_of)


# all segments are joined when the rows of later segments and the masked rows exceed both this share and this number
MAX_LATE_SHARE = 0.1
MAX_LATE = 1000


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys by ascending seq, the adapter's number in the order of addition. `alive_N`, if any, is False at outdated keys."""

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
        """Return the positions in this segment of the seqs that it holds; other seqs are skipped."""
        at_M = np.searchsorted(self.seqs_N, seqs_M)
        inside = at_M < len(self.seqs_N)
        at_M = at_M[inside]
        rows_R: np.ndarray = at_M[self.seqs_N[at_M] == seqs_M[inside]]
        return rows_R


@dataclass(frozen=True, eq=False)
class Hits:
    """The K best keys for one query: their scores, descending with ties by seq, the adapters' seqs, and the keys."""

    scores_K: np.ndarray
    seqs_K: np.ndarray
    keys_KD: np.ndarray


@dataclass(frozen=True, eq=False)
class Keys:
    """All search keys of a hub as of one generation of its catalogue."""

    dim: int
    choice: Choice
    segments: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        return sum(segment.num_alive for segment in self.segments)

    @property
    def num_late(self) -> int:
        """The number of keys that a search reads beyond one unmasked segment: those of later segments, and masked ones."""
        masked = sum(len(segment.seqs_N) - segment.num_alive for segment in self.segments)
        return masked + sum(len(segment.seqs_N) for segment in self.segments[1:])

    def changed(self, seqs_M: np.ndarray, new_seqs_N: np.ndarray, new_keys_ND: np.ndarray) -> Keys:
        """Return the keys without those of `seqs_M`, and with the new keys, which are sorted by seq."""
        if not len(seqs_M) and not len(new_seqs_N):
            return self
        gone_M = np.union1d(seqs_M, new_seqs_N)
        segments = [segment.without(gone_M) for segment in self.segments]
        if len(new_seqs_N):
            segments.append(self._segment(new_seqs_N, new_keys_ND))
        kept = replace(self, segments=tuple([segment for segment in segments if segment.num_alive]))
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
        """Return each query's k best keys; `allowed_seqs`, ascending, restricts the search to these adapters."""
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


@dataclass(frozen=True)
class Stamp:
    """The identity of a saved index: the catalogue, its generation, the embedder of the keys, and the kind of index."""

    identity: str
    generation: int
    embedder: str
    index: str


class IndexFiles(Protocol):
    """The interface of an extension's `index_files.py`, which saves large indexes in the folder `index` of a place."""

    def load(self, places: Sequence[Path], wanted: Stamp, dim: int, choice: Choice) -> tuple[Keys, Stamp] | None:
        """Return the newest saved keys by the wanted embedder and index, memory-mapped, and their stamp; else None."""

    def save(self, place: Path, stamp: Stamp, keys: Keys) -> Keys | None:
        """Save keys of one segment and return them memory-mapped; None if they are too few or cannot be saved."""

    def problems(self, place: Path) -> Iterator[str]:
        """Yield a sentence for each damaged file of the index saved at `place`."""


def index_files() -> list[IndexFiles]:
    """Return the `index_files` modules of extensions and other packages, which save large indexes."""
    return list(bringing("index_files"))


def problems(place: Path) -> Iterator[str]:
    """Yield a sentence for each damaged file of a search index of the hub in this folder."""
    for files in index_files():
        yield from files.problems(place)
