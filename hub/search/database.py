"""Search of a hub whose catalogue ranks the vectors itself: only the hits come to this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from loraweave.errors import HubError
from loraweave.hub.listing import Listing
from loraweave.hub.stores.protocols import Near, VectorSearch
from loraweave.types import Record

# adapters whose keys are made and stored at a time: a first search that is interrupted keeps what it has
_BATCH = 500

_logger = logging.getLogger(__name__)


class DatabaseSearch:
    """Finds what a search over all vectors finds. `key` makes an adapter's vector, `digest` says of which texts."""

    def __init__(
        self,
        hub: Listing,
        search: VectorSearch,
        embedder: str,
        key: Callable[[Record], np.ndarray],
        digest: Callable[[Record], str],
    ) -> None:
        self.hub = hub
        self._search = search
        self._embedder = embedder
        self._key = key
        self._digest = digest
        self._ready: int | None = None

    def hits(self, query_QD: np.ndarray, k: int, seqs: Sequence[int] | None) -> list[list[Near]] | None:
        """For each query the k best, by descending score, ties in order of addition; of `seqs` only, if they are given.

        None when the stored vectors do not suffice, because they cannot be written, or one of them is damaged or was made
        by another release: then all adapters have to be looked at here.
        """
        try:
            self._make_ready()
        except HubError as error:
            # searching only reads: a hub that is read-only, full or locked still answers
            _logger.info("the embeddings cannot be stored, so the search runs here: %s", error)
            return None
        found = []
        for query_D in query_QD:
            nearest = self._search.nearest(self._embedder, query_D, k, seqs)
            if nearest is None or any(near.text_digest != self._digest(near.record) for near in nearest):
                return None
            found.append(nearest)
        return found

    def _make_ready(self) -> None:
        # read before the rows: a write in between makes the next search look again, never the reverse
        generation = self.hub.generation
        if generation == self._ready:
            return
        while records := self._search.unready(self._embedder, _BATCH):
            _logger.info("embedding %d adapters with %s", len(records), self._embedder)
            made = [(record.name, self._digest(record), self._key(record)) for record in records]
            self.hub.store_vectors(self._embedder, made)
            generation = self.hub.generation
        self._ready = generation
