"""What the hub asks of the place of its rows and of the place of its blobs, so that either can be on another machine.

`catalogue` and `folder_blobs` beside this file are the two on this one, and the measure for every other.
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
    """The rows that a statement found."""

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Connection(Protocol):
    """Runs SQL that SQLite and PostgreSQL both understand, with `?` where a parameter goes."""

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor: ...


@dataclass(frozen=True, eq=False)
class Near:
    """An adapter whose vector is near a query, the digest of the text that the vector was made of, its score, and it."""

    record: Record
    text_digest: str
    score: float
    key_D: np.ndarray


class VectorSearch(Protocol):
    """Ranks the stored vectors where they are, with the scores and the order of the index `flat`."""

    def unready(self, embedder: str, limit: int) -> list[Record]:
        """At most `limit` adapters that have no vector of the embedder, or were changed since it was made."""
        ...

    def nearest(self, embedder: str, query_D: np.ndarray, k: int, seqs: Sequence[int] | None) -> list[Near] | None:
        """The k best, of those numbers only where `seqs` are given. None when a vector is missing or damaged."""
        ...


class CatalogueStore(Protocol):
    """The rows. Every method raises leaves of HubError; several processes and threads may use one catalogue at once."""

    writable: bool

    @property
    def where(self) -> str:
        """The place as a message may name it: without a password."""
        ...

    @property
    def vector_search(self) -> VectorSearch | None:
        """What ranks the stored vectors in the database itself; None where that must be done here."""
        return None

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection on which everything read belongs to the same moment."""
        ...

    def locked(self, doing: str) -> AbstractContextManager[None]:
        """Holds the write lock between processes and threads. HubReadOnly, or HubLocked after the time-out."""
        ...

    def transaction(self, doing: str) -> AbstractContextManager[Connection]:
        """One write transaction, committed on leaving; the caller holds the lock. A change of rows raises the generation."""
        ...

    @contextmanager
    def writing(self, doing: str) -> Iterator[Connection]:
        """The write lock and a transaction."""
        with self.locked(doing), self.transaction(doing) as connection:
            yield connection

    def problems(self, connection: Connection) -> list[str]:
        """What the database itself finds wrong with its files."""
        ...

    def empty_log(self) -> None:
        """Gives back space that the database needs no more, where it does not do so itself. The caller holds the lock."""
        return

    def close(self) -> None: ...


class BlobStore(Protocol):
    """The blobs, each named by the hash of its content: one is there whole or not at all, and is never written again.

    FileNotFoundError where a blob is missing, AdapterCorrupt where its bytes are not those asked for, OSError or a leaf of
    HubError where the store fails. The caller of a method that writes holds the catalogue's lock.
    """

    @property
    def root(self) -> str:
        """The place of all blobs, as a message may name it."""
        ...

    def owner(self) -> str | None:
        """The identity of the hub that the blobs belong to."""
        ...

    def claim(self, identity: str) -> None:
        """Lets the blobs belong to the hub of that identity."""
        ...

    def place(self, content_hash: str) -> str:
        """Where the blob lies or would lie, for messages."""
        ...

    def has(self, content_hash: str) -> bool: ...

    def local(self, content_hash: str, file_sha256: str | None, who: str) -> Path:
        """A file of this machine with the blob's bytes, to be mapped. None takes them whatever their sha256 is."""
        ...

    def require(self, content_hash: str, file_sha256: str, who: str) -> None:
        """Reads the blob's bytes again from where they are stored, and compares their sha256."""
        ...

    def put(self, content_hash: str, data: bytes) -> str:
        """Stores the blob for good, in place of a damaged one, and returns the sha256 of its bytes."""
        ...

    def put_many(self, blobs: Iterable[tuple[str, bytes]]) -> list[str]:
        """Stores blobs of different content as `put` does, all for good when it returns; after an error some may be."""
        return [self.put(content_hash, data) for content_hash, data in blobs]

    def settle(self, content_hash: str) -> None:
        """Makes a blob that is there already last, where a writer that was killed may have left that undone."""
        return

    def names(self) -> Iterator[str]:
        """The content hashes of all blobs, sorted."""
        ...

    def remove(self, content_hash: str) -> int:
        """Deletes the blob and returns its size in bytes."""
        ...

    def sweep(self, older_than_s: float) -> int:
        """Removes what killed writers left and returns the bytes freed."""
        ...
