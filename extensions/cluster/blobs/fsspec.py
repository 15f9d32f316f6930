"""The blobs of a hub in any store that fsspec reaches (s3, gs, hf, ...), each mapped from a copy on this machine."""

import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from loraweave import AdapterCorrupt, HubError, HubReadOnly, PackageMissing
from loraweave.extend import one_or_many, storage_errors
from loraweave.extend.hubs import STALE_TMP_S, BlobStore, FolderBlobs, without_credentials

# stores whose uploads show the old object or the whole new one; elsewhere a file is written under another name and renamed
_WHOLE_UPLOADS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf", "memory"}

_CHUNK_BYTES = 8 * 2**20


class Fsspec(BlobStore):
    """A `BlobStore` at a URL. `copies` is a folder on this machine, whose files are checked before they are used.

    Every upload is read back and compared before its row is written. Credentials come from where the store's own package
    looks for them: its environment variables, its configuration files, or fsspec's.
    """

    def __init__(self, url: str, copies: Path) -> None:
        self.url = url.rstrip("/")
        self.copies = FolderBlobs(copies)
        self._opened: tuple[int, Any, str] | None = None
        # raises at once for a misspelt scheme or a missing package, not at the first blob
        self._store()

    @property
    def root(self) -> str:
        return without_credentials(self.url)

    def owner(self) -> str | None:
        store, root = self._store()
        with _errors(self.root, "opening"), suppress(FileNotFoundError):
            return str(store.cat_file(f"{root}/hub-id").decode("ascii"))
        return None

    def claim(self, identity: str) -> None:
        store, root = self._store()
        try:
            with _errors(self.root, "opening", writing=True):
                self._upload(store, root, f"{root}/hub-id", identity.encode("ascii"))
        except FileNotFoundError as error:
            raise _no_bucket(f"opening {self.root}", error) from error

    def place(self, content_hash: str) -> str:
        return f"{self.root}/blobs/{content_hash[:2]}/{content_hash}.safetensors"

    def has(self, content_hash: str) -> bool:
        store, root = self._store()
        with _errors(self.place(content_hash), "looking for"):
            return bool(store.exists(_path(root, content_hash)))

    def local(self, content_hash: str, file_sha256: str | None, who: str) -> Path:
        """Return the path of the copy on this machine, fetched unless an intact copy is there."""
        if file_sha256 is not None:
            with suppress(FileNotFoundError, AdapterCorrupt):
                return self.copies.local(content_hash, file_sha256, who)
        store, root = self._store()
        with _errors(self.place(content_hash), "fetching"):
            data = store.cat_file(_path(root, content_hash))
        if file_sha256 is not None:
            self._require_same(content_hash, hashlib.sha256(data).hexdigest(), file_sha256, who)
        with storage_errors(self.copies.folder, f"keeping a copy of {self.place(content_hash)}"):
            self._keep(content_hash, data)
        return Path(self.copies.place(content_hash))

    def require(self, content_hash: str, file_sha256: str, who: str) -> None:
        self._require_same(content_hash, self._digest(content_hash), file_sha256, who)

    def put(self, content_hash: str, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        store, root = self._store()
        path, place = _path(root, content_hash), self.place(content_hash)
        try:
            with _errors(place, "storing", writing=True):
                self._upload(store, root, path, data)
            actual = self._digest(content_hash)
        except FileNotFoundError as error:
            raise _no_bucket(f"storing {place}", error) from error
        if actual != digest:
            raise HubError(f"storing {place}: what the store gives back has the sha256 {actual}, not {digest}; try again")
        # the blob is stored; without a copy the next reader fetches it
        with suppress(OSError):
            self._keep(content_hash, data)
        return digest

    def names(self) -> Iterator[str]:
        store, root = self._store()
        names: list[str] = []
        with _errors(self.root, "listing"), suppress(FileNotFoundError):
            names = [PurePosixPath(path).stem for path in store.find(f"{root}/blobs") if path.endswith(".safetensors")]
        yield from sorted(names)

    def remove(self, content_hash: str) -> int:
        store, root = self._store()
        with _errors(self.place(content_hash), "deleting", writing=True):
            size_bytes = int(store.info(_path(root, content_hash))["size"])
            store.rm_file(_path(root, content_hash))
        with suppress(OSError):
            self.copies.remove(content_hash)
        return size_bytes

    def sweep(self, older_than_s: float) -> int:
        freed = 0
        if self.copies.folder.is_dir():
            # readers write copies without the lock: a young file may still be incomplete
            with suppress(OSError):
                self.copies.sweep(max(older_than_s, STALE_TMP_S))
        store, root = self._store()
        if _uploads_whole(store):
            return 0
        with _errors(self.root, "cleaning", writing=True), suppress(FileNotFoundError):
            for path, info in store.find(f"{root}/tmp", detail=True).items():
                if older_than_s == 0 or time.time() - store.modified(path).timestamp() >= older_than_s:
                    store.rm_file(path)
                    freed += int(info["size"])
        return freed

    def _upload(self, store: Any, root: str, path: str, data: bytes) -> None:
        if _uploads_whole(store):
            store.pipe_file(path, data)
            return
        temporary = f"{root}/tmp/{uuid.uuid4().hex}.safetensors"
        for target in (temporary, path):
            store.makedirs(target.rpartition("/")[0], exist_ok=True)
        try:
            store.pipe_file(temporary, data)
            store.mv(temporary, path)
        except BaseException:
            # the first error is the one to raise; gc removes files that stay
            with suppress(Exception):
                store.rm_file(temporary)
            raise

    def _digest(self, content_hash: str) -> str:
        store, root = self._store()
        digest = hashlib.sha256()
        with (
            _errors(self.place(content_hash), "reading"),
            store.open(_path(root, content_hash), "rb", block_size=_CHUNK_BYTES) as file,
        ):
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def _require_same(self, content_hash: str, found: str, expected: str, who: str) -> None:
        if found != expected:
            raise AdapterCorrupt(
                f"{who}: blob {self.place(content_hash)} is damaged: its sha256 is {found}, not {expected}; "
                "add the adapter again from its source, which replaces the blob"
            )

    def _keep(self, content_hash: str, data: bytes) -> None:
        self.copies.folder.mkdir(parents=True, exist_ok=True)
        self.copies.put(content_hash, data)

    def _store(self) -> tuple[Any, str]:
        # connections do not survive a fork, so every process opens its own
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_open(self.url))
        return self._opened[1:]


def _open(url: str) -> tuple[Any, str]:
    """Return a URL's file system and the path in it. Raises PackageMissing, or HubError for a scheme unknown to fsspec."""
    install = "pip install 'loraweave[remote]'"
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise PackageMissing(f"blobs at {without_credentials(url)!r} need fsspec: {install}") from error
    try:
        # no cache of listings: other machines write there too
        store, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise PackageMissing(f"blobs at {without_credentials(url)!r} need a package ({error}): {install} for s3") from error
    except ValueError as error:
        raise HubError(f"blobs at {without_credentials(url)!r}: {without_credentials(str(error))}") from error
    return store, str(root).rstrip("/")


def _no_bucket(doing: str, error: FileNotFoundError) -> HubError:
    return HubError(f"{doing}: there is no such bucket or folder ({error}); create it first")


def _path(root: str, content_hash: str) -> str:
    return f"{root}/blobs/{content_hash[:2]}/{content_hash}.safetensors"


def _uploads_whole(store: Any) -> bool:
    return not _WHOLE_UPLOADS.isdisjoint(one_or_many(store.protocol))


@contextmanager
def _errors(place: str, doing: str, *, writing: bool = False) -> Iterator[None]:
    """Raise a subclass of HubError for any failure inside but FileNotFoundError. `place` is a URL, `doing` a verb.

    Each store raises the errors of its own library, which have no common base class.
    """
    try:
        yield
    except (HubError, FileNotFoundError):
        raise
    except Exception as error:
        shown = f"{doing} {without_credentials(place)}: {type(error).__name__}: {without_credentials(str(error))}"
        if isinstance(error, PermissionError) and writing:
            raise HubReadOnly(f"{shown}; these credentials may not write there; reading may still work") from error
        raise HubError(
            f"{shown}; nothing was changed. Is the store reachable, and are its credentials in the environment?"
        ) from error
