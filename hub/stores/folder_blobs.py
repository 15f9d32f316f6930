"""The store of blobs in a folder of this machine, and the storing of adapters' extra files as blobs in any store.

A file's blob is named by its sha256: equal files are stored once, and each card lists the files of its adapter. Nothing here
imports torch, so that opening, listing and cleaning a hub does not either.
"""

import hashlib
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loraweave.common.files import known_digest, remove_file, storage_errors, sync, whole_file, write_new
from loraweave.errors import AdapterCorrupt, HubError
from loraweave.hub.formats._files import as_kept_files
from loraweave.hub.stores.protocols import BlobStore
from loraweave.types import Record

# a live writer holds its temporary file only for seconds
STALE_TMP_S = 3600.0
# the key of the card under which an adapter's files are listed: {name: [sha256, size in bytes]}
LISTED = "kept_files"


class FolderBlobs(BlobStore):
    """A `BlobStore` whose blobs are the files in `folder`/blobs, memory-mapped where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def root(self) -> str:
        return str(self.folder)

    def owner(self) -> str | None:
        with suppress(FileNotFoundError):
            return (self.folder / "hub-id").read_text(encoding="ascii")
        return None

    def claim(self, identity: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "hub-id") as temporary:
            write_new(temporary, identity.encode("ascii"))

    def place(self, content_hash: str) -> str:
        return str(blob_path(self.folder, content_hash))

    def has(self, content_hash: str) -> bool:
        return blob_path(self.folder, content_hash).exists()

    def local(self, content_hash: str, file_sha256: str | None, who: str) -> Path:
        """Return the path of the blob's file; a file unchanged since its last check is not read again."""
        path = blob_path(self.folder, content_hash)
        if file_sha256 is not None:
            require_digest(path, file_sha256, who)
        return path

    def require(self, content_hash: str, file_sha256: str, who: str) -> None:
        require_digest(blob_path(self.folder, content_hash), file_sha256, who, trust_cache=False)

    def put(self, content_hash: str, data: bytes) -> str:
        return self.put_many([(content_hash, data)])[0]

    def put_many(self, blobs: Iterable[tuple[str, bytes]]) -> list[str]:
        """Store each (content hash, data), sync every folder once, and return the sha256 of each file in order.

        All bytes are on disk before the first file gets its name, so a blob that is seen is whole even after a power
        failure. An error leaves no temporary file behind, but some blobs may have their names by then.
        """
        placed: list[tuple[Path, Path, str]] = []
        try:
            for content_hash, data in blobs:
                target = blob_path(self.folder, content_hash)
                for parent in (self.folder / "tmp", self.folder / "blobs", target.parent):
                    if not parent.is_dir():
                        # readers of a remote store make folders for their copies, and take no lock
                        with suppress(FileExistsError):
                            os.mkdir(parent)
                temporary = self.folder / "tmp" / f"{uuid.uuid4().hex}.safetensors"
                placed.append((temporary, target, hashlib.sha256(data).hexdigest()))
                write_new(temporary, data)
            # written first and synced then: the first of these calls waits for the bytes of most others too
            for temporary, _, _ in placed:
                sync(temporary)
            for temporary, target, _ in placed:
                os.replace(temporary, target)
            self._sync_names(target.parent for _, target, _ in placed)
        except BaseException:
            for temporary, _, _ in placed:
                remove_file(temporary)
            raise
        return [digest for _, _, digest in placed]

    def settle(self, content_hash: str) -> None:
        self._sync_names([blob_path(self.folder, content_hash).parent])

    def names(self) -> Iterator[str]:
        for path in sorted((self.folder / "blobs").glob("*/*.safetensors")):
            yield path.stem

    def remove(self, content_hash: str) -> int:
        path = blob_path(self.folder, content_hash)
        size_bytes = path.stat().st_size
        path.unlink()
        return size_bytes

    def sweep(self, older_than_s: float) -> int:
        freed = 0
        for path in (self.folder / "tmp").glob("*"):
            # another process may have swept it
            with suppress(FileNotFoundError):
                status = path.lstat()
                if time.time() - status.st_mtime >= older_than_s:
                    path.unlink()
                    freed += status.st_size
        return freed

    def _sync_names(self, folders: Iterable[Path]) -> None:
        for parent in (*sorted(set(folders)), self.folder / "blobs", self.folder):
            sync(parent)


def blob_path(folder: Path, content_hash: str) -> Path:
    return folder / "blobs" / content_hash[:2] / f"{content_hash}.safetensors"


def require_digest(path: Path, expected: str, who: str, *, trust_cache: bool = True) -> None:
    """Raise AdapterCorrupt if the file's sha256 is not `expected`. An unchanged file is read once per process."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise AdapterCorrupt(f"{who}: blob {path} is not a regular file")
    digest = known_digest(path, trust_cache=trust_cache)
    if digest != expected:
        raise AdapterCorrupt(
            f"{who}: blob {path} is damaged: its sha256 is {digest}, not {expected}; "
            "add the adapter again from its source, which replaces the blob"
        )


def without_files(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card of an `Adapter` from a stored card, which also lists the adapter's files."""
    return {key: value for key, value in card.items() if key != LISTED}


def with_files(card: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the card as the catalogue stores it: with {name: [sha256, size]} of the files, if there are any."""
    table = {name: [file.sha256, file.size_bytes] for name, file in as_kept_files(files).files.items()}
    return {**without_files(card), **({LISTED: table} if table else {})}


def listed(record: Record) -> dict[str, tuple[str, int]]:
    """Return (sha256, size in bytes) of each of the adapter's extra files by name."""
    return {name: (str(digest), int(size)) for name, (digest, size) in record.card.get(LISTED, {}).items()}


def digests(records: Iterable[Record]) -> set[str]:
    """Return the sha256 of every extra file of these adapters."""
    return {digest for record in records for digest, _ in listed(record).values()}


def put_files(blobs: BlobStore, files: Mapping[str, bytes]) -> None:
    """Store an adapter's extra files, skipping those that are intact in the store. The caller holds the write lock."""
    for name, file in as_kept_files(files).files.items():
        if blobs.has(file.sha256):
            with suppress(AdapterCorrupt, FileNotFoundError):
                blobs.local(file.sha256, file.sha256, name)
                blobs.settle(file.sha256)
                continue
        blobs.put(file.sha256, file.read())


@contextmanager
def reading_blob(blobs: BlobStore, content_hash: str, who: str) -> Iterator[None]:
    """Let errors of reading a blob in the block name its owner `who`. Raises AdapterCorrupt if the blob is missing."""
    place = blobs.place(content_hash)
    with storage_errors(place, f"reading {who}"):
        try:
            yield
        except FileNotFoundError as error:
            raise AdapterCorrupt(f"{who}: blob {place} is missing; add the adapter again from its source") from error


def file_bytes(blobs: BlobStore, digest: str, who: str) -> bytes:
    """Return the bytes of a stored file. Raises AdapterCorrupt if it is missing or damaged."""
    with reading_blob(blobs, digest, who):
        return blobs.local(digest, digest, who).read_bytes()


def file_problems(blobs: BlobStore, record: Record, known: dict[str, str]) -> Iterator[str]:
    """Yield a sentence for each missing or damaged file of an adapter. `known` caches `blob_fault` by sha256."""
    for name, (digest, _) in listed(record).items():
        if fault := blob_fault(blobs, digest, known):
            yield f"{name} of adapter {record.name!r}: {fault}; add the adapter again from its source"


def blob_fault(blobs: BlobStore, digest: str, known: dict[str, str]) -> str:
    """Return a phrase for what is wrong with a stored file, or "" if it is intact. `known` caches the phrase by sha256."""
    if digest not in known:
        known[digest] = ""
        try:
            blobs.require(digest, digest, "the blob")
        except FileNotFoundError:
            known[digest] = f"blob {blobs.place(digest)} is missing"
        except (HubError, OSError) as error:
            known[digest] = str(error)
    return known[digest]
