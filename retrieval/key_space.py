"""What keys read: the texts of adapters and queries as unit vectors, and the adapters themselves, each made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from loraweave.errors import HubError
from loraweave.hub.hub import Hub
from loraweave.hub.search import MAX_SAMPLE_INPUTS, SearchIndex, unit
from loraweave.types import Record

if TYPE_CHECKING:
    from loraweave.hub.adapter import Adapter

# adapters whose texts stay embedded: 50 x 428 x 4 bytes = 86 kB each at most
_NUM_TEXTS_CACHED = 2048
_NUM_ADAPTERS_CACHED = 64
# vectors that keys made of records; all are made anew after so many
_NUM_MADE_KEPT = 8192


class KeySpace:
    """The texts and adapters of a hub for keys, by one embedder."""

    def __init__(self, hub: Hub, index: SearchIndex) -> None:
        self.hub = hub
        self._index = index
        self._embed = lru_cache(maxsize=_NUM_TEXTS_CACHED)(index.embed)
        self._adapter = lru_cache(maxsize=_NUM_ADAPTERS_CACHED)(self._read)
        self._made_once: dict[tuple[str, str], tuple[Record, np.ndarray]] = {}

    @property
    def dim(self) -> int:
        """Numbers of a text's vector."""
        return self._index.embedder.dim

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (N, dim), float64; (0, dim) without texts."""
        if not texts:
            return np.empty((0, self.dim))
        return self._embed(tuple(texts)).astype(np.float64)

    def samples(self, record: Record) -> np.ndarray:
        """The record's sample inputs (M, dim)."""
        return self.embed([text for text in record.examples if text.strip()][:MAX_SAMPLE_INPUTS])

    def pairs(self, record: Record) -> list[tuple[str, str]]:
        """The record's sample inputs with their outputs, which its card may hold as `outputs` in the same order."""
        outputs = record.card.get("outputs")
        if not isinstance(outputs, list | tuple) or len(outputs) != len(record.examples):
            return []
        pairs = zip(record.examples, outputs, strict=True)
        return [(i, o) for i, o in pairs if i.strip() and isinstance(o, str) and o.strip()][:MAX_SAMPLE_INPUTS]

    def once(self, what: str, record: Record, make: Callable[[Record], np.ndarray]) -> np.ndarray:
        """What `make` gives for a record, made again only when the record has changed. `what` tells makers apart."""
        known = self._made_once.get((what, record.name))
        if known is not None and (known[0] is record or known[0] == record):
            return known[1]
        if len(self._made_once) >= _NUM_MADE_KEPT:
            self._made_once = {}
        made = make(record)
        self._made_once[what, record.name] = (record, made)
        return made

    def sample_mean(self, record: Record) -> np.ndarray:
        """The direction of the mean of the sample inputs (dim,); zeros without any."""
        return self.once("sample mean", record, lambda record: self.mean(self.samples(record)))

    def mean(self, rows_ND: np.ndarray) -> np.ndarray:
        """The direction of the mean (dim,); zeros without rows."""
        return unit(rows_ND.mean(axis=0)).astype(np.float64) if len(rows_ND) else np.zeros(self.dim)

    def adapter(self, record: Record) -> Adapter:
        """The record's adapter; what Hub raises for a damaged one."""
        return self._adapter(record.name, record.hash)

    def stored(self, key_id: str, records: Sequence[Record], make: Callable[[Adapter], np.ndarray]) -> np.ndarray:
        """A vector of each adapter's content (N, D), kept in the catalogue once made; NaN for an adapter that is damaged."""
        known = self.hub.vectors(key_id)
        rows: list[np.ndarray | None] = []
        made = []
        for record in records:
            digest, vector_D = known.get(record.name, ("", None))
            if digest != record.hash or vector_D is None:
                vector_D = self._made(record, make)
                if vector_D is not None:
                    made.append((record.name, record.hash, vector_D))
            rows.append(vector_D)
        if made:
            self._store(key_id, made)
        width = max((len(row) for row in rows if row is not None), default=0)
        return np.array([np.full(width, np.nan) if row is None else row for row in rows], dtype=np.float64).reshape(
            -1, width
        )

    def _made(self, record: Record, make: Callable[[Adapter], np.ndarray]) -> np.ndarray | None:
        try:
            return make(self.adapter(record)).astype(np.float32)
        except HubError:
            return None

    def _store(self, key_id: str, made: list[tuple[str, str, np.ndarray]]) -> None:
        try:
            self.hub.store_vectors(key_id, made)
        except HubError:
            # a hub that is read-only, full or locked is searched all the same; the vectors are made again next time
            return

    def _read(self, name: str, content_hash: str) -> Adapter:
        return self.hub[name]
