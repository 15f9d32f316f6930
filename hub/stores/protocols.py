"""The interfaces of the store of a hub's rows and of the store of its blobs, so that either can be on another machine.

`catalogue` and `folder_blobs` beside this file implement them on this machine; entries of the registries `catalogues` and
`blobs` must behave in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loraweave.types import Record

if TYPE_CHECKING:
    import numpy as np


class Cursor(Protocol):
    """A cursor over the rows that an SQL statement returned."""

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Connection(Protocol):
    """A connection that runs the SQL that SQLite and PostgreSQL share, with `?` for each parameter."""

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor: ...


@dataclass(frozen=True, eq=False)
class Near:
    """An adapter whose vector `key_D` is near a query, its score, and the digest of the text that was embedded."""

    record: Record
    text_digest: str
    score: float
    key_D: np.ndarray


class VectorSearch(Protocol):
    """A search that ranks the stored vectors in the database, with the scores and the order of the index `flat`."""

    def unready(self, embedder: str, limit: int) -> list[Record]:
        """Return at most `limit` adapters without a vector of the embedder, or changed since it was made."""
        ...

    def nearest(self, embedder: str, query_D: np.ndarray, k: int, seqs: Sequence[int] | None) -> list[Near] | None:
        """Return the k best of the rows `seqs` (None for all), or None if a vector is missing or damaged."""
        ...


class CatalogueStore(Protocol):
    """The store of a hub's rows. Methods raise subclasses of HubError; processes and threads may use it at once."""

    writable: bool

    @property
    def where(self) -> str:
        """The place of the catalogue, without a password, as messages name it."""
        ...

    @property
    def vector_search(self) -> VectorSearch | None:
        """The search that ranks the stored vectors in the database; None if this process must rank them."""
        return None

    def reading(self) -> AbstractContextManager[Connection]:
        """Return a context that gives a connection on which everything read belongs to the same moment."""
        ...

    def locked(self, doing: str) -> AbstractContextManager[None]:
        """Hold the write lock between processes and threads. Raises HubReadOnly, or HubLocked after the time-out."""
        ...

    def transaction(self, doing: str) -> AbstractContextManager[Connection]:
        """Open a write transaction, committed on leaving. The caller holds the lock. Changed rows raise the generation."""
        ...

    @contextmanager
    def writing(self, doing: str) -> Iterator[Connection]:
        """Hold the write lock and yield a write transaction."""
        with self.locked(doing), self.transaction(doing) as connection:
            yield connection

    def problems(self, connection: Connection) -> list[str]:
        """Return the problems that the database itself finds in its files."""
        ...

    def empty_log(self) -> None:
        """Free the space of the database's log, if the database does not do so itself. The caller holds the lock."""
        return

    def close(self) -> None: ...


class SharedCatalogue(CatalogueStore, Protocol):
    """The store of a hub's rows on a server; an entry of the registry `catalogues` makes one from (url, timeout_s)."""

    def claim(self) -> tuple[str, str | None]:
        """Return the hub's identity, and the noted URL of its blobs or None if no URL is noted."""
        ...

    def note_blobs(self, place: str) -> None:
        """Note the URL of the hub's blobs, so that the next opening need not give it."""
        ...


class BlobStore(Protocol):
    """The store of a hub's blobs, each named by its content hash, present as a whole or not at all, and never changed.

    Methods raise FileNotFoundError if a blob is missing, AdapterCorrupt if its bytes do not have the sha256 asked for,
    OSError or a subclass of HubError if the store fails. The caller of a method that writes holds the catalogue's lock.
    """

    @property
    def root(self) -> str:
        """The place of all blobs, as messages name it."""
        ...

    def owner(self) -> str | None:
        """Return the identity of the hub that the blobs belong to, or None if no hub has claimed them."""
        ...

    def claim(self, identity: str) -> None:
        """Mark the blobs as those of the hub with this identity."""
        ...

    def place(self, content_hash: str) -> str:
        """Return the place of the blob, present or not, for messages."""
        ...

    def has(self, content_hash: str) -> bool: ...

    def local(self, content_hash: str, file_sha256: str | None, who: str) -> Path:
        """Return the path of a local file with the blob's bytes. `file_sha256`=None skips the check of its sha256."""
        ...

    def require(self, content_hash: str, file_sha256: str, who: str) -> None:
        """Read the blob's bytes anew from the store and check their sha256; `who` names the blob's owner in errors."""
        ...

    def put(self, content_hash: str, data: bytes) -> str:
        """Store the blob durably, in place of a damaged one, and return the sha256 of its bytes."""
        ...

    def put_many(self, blobs: Iterable[tuple[str, bytes]]) -> list[str]:
        """Store blobs of different content as `put` does, all durably on return; after an error some may be stored."""
        return [self.put(content_hash, data) for content_hash, data in blobs]

    def settle(self, content_hash: str) -> None:
        """Make a blob that is present durable, in case a writer was killed before it did so."""
        return

    def names(self) -> Iterator[str]:
        """Yield the content hashes of all blobs, sorted."""
        ...

    def remove(self, content_hash: str) -> int:
        """Delete the blob and return its size in bytes."""
        ...

    def sweep(self, older_than_s: float) -> int:
        """Remove the leftovers of killed writers that are older than `older_than_s`, and return the bytes freed."""
        ...
