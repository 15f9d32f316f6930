"""A map and a sortable table of all adapters of a hub, made in the background as the hub changes.

Points are the first two principal components of the embeddings that the hub's search keeps. They are fitted once; later
adapters are projected onto the same plane, until a tenth of all has changed. While the search still makes its embeddings,
a first map has the principal components of hashed words, which are there at once.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA

from loraweave import Hub, LoraweaveError, Record
from loraweave.extend.hubs import Filters, embedder_of

Array = NDArray[Any]

# the most points that a browser draws; more adapters are sampled
MAX_POINTS = 50_000
# the number of colours that people with any kind of colour vision tell apart
MAX_CLUSTERS = 7
# up to this many adapters, each step of k-means uses all of them
MAX_EXACT = 5000
# the share of changed adapters from which the plane is fitted again
REFIT_SHARE = 0.1
# the largest x and y of a point
SIDE = 2**16 - 1
# the most adapters whose words are hashed for a first map, which takes 2 kB of memory for each
MAX_SKETCHED = 20_000
# the number of sample inputs of an adapter whose words count in the first map
NUM_SKETCHED_INPUTS = 5
# the place of an adapter without a stored embedding, as in a hub that cannot be written
NOWHERE = (-1, -1, -1)

_logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """An adapter's row in the table and point on the map; `x`, `y` and `cluster` are -1 if it has no embedding."""

    name: str
    license: str | None
    rank: int
    size_bytes: int
    created: str
    x: int
    y: int
    cluster: int


@dataclass(frozen=True, eq=False)
class Plane:
    """The fitted plane: principal components, the corner and size of the area with points, and the clusters."""

    pca: PCA
    clusters: KMeans | MiniBatchKMeans
    low_2: Array
    span_2: Array

    @classmethod
    def of(cls, vectors_ND: Array) -> Plane:
        num_axes = min(2, *vectors_ND.shape)
        pca = PCA(num_axes, random_state=0).fit(vectors_ND)
        # k-means needs at least as many different points as clusters
        most = min(MAX_CLUSTERS, max(1, round((len(vectors_ND) / 2) ** 0.5)), len(np.unique(vectors_ND[:1000], axis=0)))
        kind = KMeans if len(vectors_ND) <= MAX_EXACT else MiniBatchKMeans
        clusters = kind(most, n_init=10, random_state=0).fit(vectors_ND)
        xy_N2 = _two_columns(pca.transform(vectors_ND))
        low_2, high_2 = xy_N2.min(axis=0), xy_N2.max(axis=0)
        return cls(pca, clusters, low_2, np.where(high_2 > low_2, high_2 - low_2, 1.0))

    def places(self, vectors_ND: Array) -> list[tuple[int, int, int]]:
        """Return (x, y, cluster) of each vector; x and y are whole numbers from 0 to SIDE."""
        xy_N2 = (_two_columns(self.pca.transform(vectors_ND)) - self.low_2) / self.span_2
        xy_N2 = np.rint(xy_N2.clip(0, 1) * SIDE).astype(int)
        of_cluster_N = self.clusters.predict(vectors_ND)
        return [(*xy, cluster) for xy, cluster in zip(xy_N2.tolist(), of_cluster_N.tolist(), strict=True)]


def _two_columns(xy_NA: Array) -> Array:
    """Add a second axis of zeros to points that have only one."""
    return np.pad(xy_NA, ((0, 0), (0, 2 - xy_NA.shape[1])))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All adapters outside quarantine at one generation of the hub, keyed by their number in the order of addition."""

    identity: str = ""
    generation: int = 0
    entries: Mapping[int, Entry] = field(default_factory=dict)
    plane: Plane | None = None
    # True for a first map, by hashed words
    is_sketch: bool = False
    _orders: dict[tuple[str, bool], Sequence[int]] = field(default_factory=dict)

    def order(self, key: str, descending: bool) -> Sequence[int]:
        """Return the adapters' numbers sorted by a field of `Entry`; ties are in order of addition."""
        ordering = key, descending
        if ordering not in self._orders:
            values = {seq: getattr(entry, key) for seq, entry in self.entries.items()}
            # missing values (None) sort before all others
            self._orders[ordering] = sorted(
                values, key=lambda seq: (values[seq] is not None, values[seq]), reverse=descending
            )
        return self._orders[ordering]

    @cached_property
    def seqs(self) -> dict[str, int]:
        """The mapping {name: number in the order of addition}."""
        return {entry.name: seq for seq, entry in self.entries.items()}

    @cached_property
    def licenses(self) -> dict[str | None, int]:
        """The number of adapters with each license, the most frequent first."""
        return dict(Counter(entry.license for entry in self.entries.values()).most_common())

    def named(self, text: str, count: int) -> list[str]:
        """List the first `count` names that contain the text, whatever its case."""
        wanted = text.casefold()
        names = (entry.name for entry in self.entries.values() if wanted in entry.name.casefold())
        return list(islice(names, count))

    def points(self) -> dict[str, Any]:
        """Return what a browser draws: little-endian arrays in base64, x and y from 0 to 65535, and the colours' names."""
        seqs = shown = [seq for seq, entry in self.entries.items() if entry.cluster >= 0]
        if len(seqs) > MAX_POINTS:
            # at random: every n-th could miss kinds that were added in turns
            shown = sorted(np.random.default_rng(0).choice(seqs, MAX_POINTS, replace=False).tolist())
        entries = [self.entries[seq] for seq in shown]
        known = list(self.licenses)[:MAX_CLUSTERS]
        license_of = {license: number for number, license in enumerate(known)}
        kinds = {"x": "<u2", "y": "<u2", "cluster": "u1"}
        columns = {"seq": np.array(shown, "<u4")}
        columns |= {name: np.array([getattr(entry, name) for entry in entries], kind) for name, kind in kinds.items()}
        columns["license"] = np.array([license_of.get(entry.license, len(known)) for entry in entries], "u1")
        return {
            "generation": self.generation,
            "count": len(shown),
            "placed": len(seqs),
            "total": len(self.entries),
            "by_words": self.is_sketch,
            "clusters": self._cluster_names(entries),
            "licenses": [license or "none stated" for license in known] + ["other"] * (len(self.licenses) > len(known)),
            # a small hub's points have their names beside them
            "names": [entry.name for entry in entries] if len(shown) <= MAX_NAMED else [],
            "columns": {name: base64.b64encode(column.tobytes()).decode() for name, column in columns.items()},
        }

    def _cluster_names(self, entries: Sequence[Entry]) -> list[str]:
        """Name each cluster by the adapter in the middle of its points."""
        names = []
        for number in range(0 if self.plane is None else self.plane.clusters.n_clusters):
            members = [entry for entry in entries if entry.cluster == number]
            if not members:
                names.append("none")
                continue
            xy_N2 = np.array([(entry.x, entry.y) for entry in members])
            names.append(members[int(np.argmin(((xy_N2 - xy_N2.mean(axis=0)) ** 2).sum(axis=1)))].name)
        return names


# seconds
CLOSING_S = 2.0
# up to this many points, the answer has their names
MAX_NAMED = 200


class Overview:
    """A holder of the newest snapshot of a hub, which a thread renews when it is asked for after the hub has changed."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._searching = threading.Lock()
        self._searched = False
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failed_at = -1
        self.error = ""

    @property
    def newest(self) -> Snapshot | None:
        """The last snapshot, perhaps of an older generation; None before the first. `busy` is True while one is made."""
        with self._lock:
            generation = self._hub.generation
            stale = (self._snapshot is None or self._snapshot.generation != generation) and self._failed_at != generation
            if stale and self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._follow, name="loraweave-overview", daemon=True)
                self._thread.start()
            return self._snapshot

    @property
    def busy(self) -> bool:
        return self._thread is not None

    def require_search(self) -> None:
        """Make the hub's first search, which may embed every adapter, or wait for the thread that is making it."""
        with self._searching:
            if not self._searched:
                self._hub.search("an adapter", k=1)
                self._searched = True

    def close(self) -> None:
        """Begin no further snapshot, and wait up to CLOSING_S seconds for the one that is being made."""
        with self._lock:
            self._closed, thread = True, self._thread
        if thread is not None:
            thread.join(CLOSING_S)

    def _follow(self) -> None:
        generation, self.error = self._hub.generation, ""
        try:
            if len(self._hub):
                if self._snapshot is None and len(self._hub) <= MAX_SKETCHED:
                    first = self._hub.changes(embedder_of("sentence").id).page
                    # a first map, unless most have a stored embedding already
                    if 2 * sum(change.vector is not None for change in first) <= len(first):
                        self._put(sketched(self._hub))
                self.require_search()
                # the first search makes and stores missing embeddings
                self._hub.search("an adapter", k=1)
            old = self._snapshot
            self._put(followed(self._hub, Snapshot() if old is None or old.is_sketch else old))
        except Exception as error:
            # after close(), the hub may be closed while the thread reads it
            if not self._closed and not isinstance(error, LoraweaveError):
                _logger.error("the map was not made", exc_info=error)
            self.error, self._failed_at = f"{type(error).__name__}: {error}", generation
        finally:
            with self._lock:
                self._thread = None

    def _put(self, made: Snapshot) -> None:
        with self._lock:
            self._snapshot = made


def followed(hub: Hub, old: Snapshot) -> Snapshot:
    """Return a snapshot of the hub as it is now, built on an older one of the same catalogue if little has changed."""
    embedder = embedder_of("sentence").id
    changed: dict[int, Any] = {}
    first, after = None, 0
    while True:
        page = hub.changes(embedder, since=old.generation, after=after)
        # changes made meanwhile belong to the next snapshot
        first = first or page
        if old.generation and page.identity != old.identity:
            return followed(hub, Snapshot())
        if not page.page:
            break
        changed |= {change.seq: change for change in page.page}
        after = page.page[-1].seq
    if old.generation and len(changed) > REFIT_SHARE * len(old.entries):
        return followed(hub, Snapshot())
    records = hub.records_at([seq for seq, change in changed.items() if change.said is not None])
    placed = {seq: change.vector[1] for seq, change in changed.items() if seq in records and change.vector is not None}
    plane, places = _placed(old.plane, placed)
    entries = {seq: entry for seq, entry in old.entries.items() if seq not in changed}
    entries |= _entries(records, places)
    return Snapshot(first.identity, first.generation, dict(sorted(entries.items())), plane)


def sketched(hub: Hub) -> Snapshot:
    """Return a snapshot whose points are placed by the hashed words of descriptions and sample inputs."""
    words = embedder_of("hashing")
    now = hub.changes(words.id)
    records = hub.records_at(hub.seqs(Filters()))
    texts = [
        " ".join((record.description or record.name, *record.examples[:NUM_SKETCHED_INPUTS])) for record in records.values()
    ]
    plane, places = _placed(None, dict(zip(records, words.embed(texts), strict=True)))
    return Snapshot(now.identity, now.generation, _entries(records, places), plane, is_sketch=True)


def _placed(plane: Plane | None, vectors: Mapping[int, Array]) -> tuple[Plane | None, dict[int, tuple[int, int, int]]]:
    """Return the plane, fitted on the vectors if it is None, and the place of each adapter on it."""
    if not vectors:
        return plane, {}
    vectors_ND = np.stack(list(vectors.values()))
    plane = plane or Plane.of(vectors_ND)
    return plane, dict(zip(vectors, plane.places(vectors_ND), strict=True))


def _entries(records: Mapping[int, Record], places: Mapping[int, tuple[int, int, int]]) -> dict[int, Entry]:
    return {
        seq: Entry(one.name, one.license, one.rank, one.size_bytes, one.created, *places.get(seq, NOWHERE))
        for seq, one in records.items()
    }


def in_order(snapshot: Snapshot | None, seqs: Collection[int], key: str, descending: bool) -> list[int]:
    """Sort the adapters' numbers by a field of `Entry` or by "added"; numbers that the snapshot lacks come last.

    "added" needs no snapshot.
    """
    if key == "added" or snapshot is None:
        return sorted(seqs, reverse=descending)
    wanted = set(seqs)
    ordered = [seq for seq in snapshot.order(key, descending) if seq in wanted]
    return ordered + sorted(wanted.difference(ordered))
