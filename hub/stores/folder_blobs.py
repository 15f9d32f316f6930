"""The blobs of a hub in a folder of this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from loraweave.hub.stores.blob_files import (
    blob_path,
    place_blob,
    place_blobs,
    replace_file,
    require_digest,
    stored_blobs,
    sweep,
    sync_folders,
)


class FolderBlobs:
    """A `BlobStore` whose blobs are the files below `folder`/blobs, mapped where they lie."""

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
        replace_file(self.folder / "hub-id", identity.encode("ascii"))

    def place(self, content_hash: str) -> str:
        return str(blob_path(self.folder, content_hash))

    def has(self, content_hash: str) -> bool:
        return blob_path(self.folder, content_hash).exists()

    def local(self, content_hash: str, file_sha256: str | None, who: str) -> Path:
        """The blob's file; one that has not changed since it was last compared is not read again."""
        path = blob_path(self.folder, content_hash)
        if file_sha256 is not None:
            require_digest(path, file_sha256, who)
        return path

    def require(self, content_hash: str, file_sha256: str, who: str) -> None:
        require_digest(blob_path(self.folder, content_hash), file_sha256, who, trust_cache=False)

    def put(self, content_hash: str, data: bytes) -> str:
        return place_blob(self.folder, blob_path(self.folder, content_hash), data)

    def put_many(self, blobs: Iterable[tuple[str, bytes]]) -> list[str]:
        return place_blobs(self.folder, ((blob_path(self.folder, content_hash), data) for content_hash, data in blobs))

    def settle(self, content_hash: str) -> None:
        sync_folders(self.folder, blob_path(self.folder, content_hash))

    def names(self) -> Iterator[str]:
        for path in stored_blobs(self.folder):
            yield path.stem

    def remove(self, content_hash: str) -> int:
        path = blob_path(self.folder, content_hash)
        size_bytes = path.stat().st_size
        path.unlink()
        return size_bytes

    def sweep(self, older_than_s: float) -> int:
        return sweep(self.folder, older_than_s)
