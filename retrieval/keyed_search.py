"""The protocol of keys, and the texts and adapters of a hub that keys look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from loraweave.common.checks import is_list, says_something
from loraweave.common.options import Declared
from loraweave.errors import HubError, LoraweaveError, RetrievalError
from loraweave.hub.embedders._embedder import unit
from loraweave.hub.hub import Hub
from loraweave.hub.search.keys import MAX_SAMPLE_INPUTS
from loraweave.hub.search.search import SearchIndex
from loraweave.retrieval.request import Query
from loraweave.types import Record

if TYPE_CHECKING:
    from loraweave.hub.adapter import Adapter


def key_name(key: Key) -> str:
    """Name a key object by its class, as the registry's files are named: `MyKey` is "my_key"."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in type(key).__name__).lstrip("_")


class DeclaredKey(Declared):
    """A key with options, which are checked against their annotations; RetrievalError for a value outside its kind."""

    noun: ClassVar[str] = "key"
    error: ClassVar[type[LoraweaveError]] = RetrievalError


class Key(Protocol):
    """One way to tell from what an adapter shows of itself how well it fits a query.

    scores_N has a number from -1 to 1 for each record, higher for a better fit, NaN where query or record lack what the key
    compares. A record's score depends on neither the order of the records nor, but for keys with the trait `relative`, on
    which others there are.
    """

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray: ...


# adapters whose texts stay embedded: 50 x 428 x 4 bytes = 86 kB each at most
_NUM_TEXTS_CACHED = 2048
_NUM_ADAPTERS_CACHED = 64
# vectors that keys made of records; all are dropped after so many
_NUM_MADE_KEPT = 8192


class KeySpace:
    """The texts and adapters of a hub for keys, by one embedder."""

    def __init__(self, hub: Hub, index: SearchIndex) -> None:
        self.hub = hub
        self._index = index
        self._embed = lru_cache(maxsize=_NUM_TEXTS_CACHED)(index.embed)
        # by name and content hash
        self._adapter = lru_cache(maxsize=_NUM_ADAPTERS_CACHED)(lambda name, content_hash: hub[name])
        self._made_once: dict[tuple[str, str], tuple[Record, np.ndarray]] = {}

    @property
    def dim(self) -> int:
        """The length of a text's vector."""
        return self._index.embedder.dim

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts as unit vectors (N, dim), float64; (0, dim) without texts."""
        if not texts:
            return np.empty((0, self.dim))
        return self._embed(tuple(texts)).astype(np.float64)

    def samples(self, record: Record) -> np.ndarray:
        """Return the vectors of the record's sample inputs (M, dim)."""
        return self._index.samples(record).astype(np.float64)

    def pairs(self, record: Record) -> list[tuple[str, str]]:
        """Pair the sample inputs with the card's `outputs`, without empty ones; [] unless there is one for each."""
        outputs = record.card.get("outputs")
        if not is_list(outputs) or len(outputs) != len(record.examples):
            return []
        pairs = zip(record.examples, outputs, strict=True)
        return [(i, o) for i, o in pairs if i.strip() and says_something(o)][:MAX_SAMPLE_INPUTS]

    def once(self, what: str, record: Record, make: Callable[[Record], np.ndarray]) -> np.ndarray:
        """Return `make(record)`, called again only if the record has changed. `what` tells makers apart."""
        known = self._made_once.get((what, record.name))
        if known is not None and (known[0] is record or known[0] == record):
            return known[1]
        if len(self._made_once) >= _NUM_MADE_KEPT:
            self._made_once = {}
        made = make(record)
        self._made_once[what, record.name] = (record, made)
        return made

    def sample_mean(self, record: Record) -> np.ndarray:
        """Return the direction of the mean of the record's sample inputs (dim,); zeros if it has none."""
        return self.once("sample mean", record, lambda record: self.mean(self.samples(record)))

    def mean(self, rows_ND: np.ndarray) -> np.ndarray:
        """Return the direction of the rows' mean (dim,); zeros without rows."""
        return unit(rows_ND.mean(axis=0)).astype(np.float64) if len(rows_ND) else np.zeros(self.dim)

    def adapter(self, record: Record) -> Adapter:
        """Load the record's adapter. Raises what Hub raises for a damaged one."""
        return self._adapter(record.name, record.hash)

    def stored(self, key_id: str, records: Sequence[Record], make: Callable[[Adapter], np.ndarray]) -> np.ndarray:
        """Return one vector for each adapter (N, D), made once and kept in the catalogue; NaN for a damaged adapter."""
        known = self.hub.vectors(key_id)
        rows: list[np.ndarray | None] = []
        made = []
        for record in records:
            digest, vector_D = known.get(record.name, ("", None))
            if digest != record.hash or vector_D is None:
                vector_D = None
                with suppress(HubError):
                    vector_D = make(self.adapter(record)).astype(np.float32)
                    made.append((record.name, record.hash, vector_D))
            rows.append(vector_D)
        if made:
            # a hub that is read-only, full or locked is searched all the same; the vectors are made again next time
            with suppress(HubError):
                self.hub.store_vectors(key_id, made)
        width = max((len(row) for row in rows if row is not None), default=0)
        return np.array([np.full(width, np.nan) if row is None else row for row in rows], dtype=np.float64).reshape(
            -1, width
        )
