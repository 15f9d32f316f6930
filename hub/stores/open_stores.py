"""Opens the catalogue and the blobs of a hub, wherever each of them is."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from loraweave.errors import HubError
from loraweave.hub.as_path import as_path
from loraweave.hub.cache_folder import cache_folder
from loraweave.hub.stores.blob_claims import read_claim, require_place, settle, write_claim
from loraweave.hub.stores.catalogue import Catalogue
from loraweave.hub.stores.folder_blobs import FolderBlobs
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore
from loraweave.hub.stores.remote_errors import without_credentials

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_FOLDERS = (None, "file", "local")


def open_stores(path: str | Path, blobs: str | Path | None, timeout_s: float) -> tuple[Path, CatalogueStore, BlobStore]:
    """(the hub's folder on this machine, its catalogue, its blobs). A hub that is elsewhere has a folder in the cache.

    HubError for a place that is of no such kind; PackageMissing, with the command that installs it.
    """
    as_path(path, "the hub")
    scheme = _scheme(path)
    given = None if blobs is None else str(blobs) if _scheme(blobs) else str(Path(blobs).absolute())
    if scheme is None:
        return _in_folder(Path(path), given, timeout_s)
    if scheme in ("postgresql", "postgres"):
        return _on_postgres(str(path), given, timeout_s)
    raise HubError(
        f"a hub's catalogue is in a folder or at postgresql://..., not at {scheme}://; "
        f'a store of files takes its blobs: Hub("folder", blobs={without_credentials(str(path))!r})'
    )


def _in_folder(folder: Path, given: str | None, timeout_s: float) -> tuple[Path, CatalogueStore, BlobStore]:
    claim = read_claim(folder)
    own = FolderBlobs(folder)
    if claim is None and given is None:
        return folder, Catalogue(folder, timeout_s, own), own
    if claim is not None and given is not None:
        require_place(given, claim.place, str(folder))
    blobs = open_blobs(given or (claim.place if claim else ""), str(folder.absolute()))
    if claim is None and (blob := next(iter(own.names()), None)) is not None:
        raise HubError(f"the hub {folder} keeps its blobs in its own folder, such as {own.place(blob)}, not at {given}")
    catalogue = Catalogue(folder, timeout_s, own if claim is None else blobs)
    try:
        if claim is None:
            with catalogue.locked("creating the hub"):
                claim = read_claim(folder) or write_claim(folder, given or "")
        settle(catalogue, blobs, claim.identity)
    except BaseException:
        catalogue.close()
        raise
    return folder, catalogue, blobs


def _on_postgres(url: str, given: str | None, timeout_s: float) -> tuple[Path, CatalogueStore, BlobStore]:
    # psycopg takes a tenth of a second to import, which hubs in folders need not pay
    from loraweave.hub.stores.postgres import PostgresCatalogue
    from loraweave.hub.stores.postgres_address import read_address

    address = read_address(url)
    catalogue = PostgresCatalogue(address, timeout_s)
    try:
        identity, noted = catalogue.claim()
        if given is None and noted is None:
            raise HubError(
                f"the hub at {address.where} needs a place for its blobs, which are files: "
                'Hub("postgresql://...", blobs="s3://bucket/prefix"), or a folder that all its users see'
            )
        if given is not None and noted is not None:
            require_place(given, noted, address.where)
        place = given or noted or ""
        blobs = open_blobs(place, address.where)
        settle(catalogue, blobs, identity)
        # a folder may have another path on another machine
        if noted is None and catalogue.writable and _scheme(place) not in _FOLDERS:
            catalogue.note_blobs(without_credentials(place))
    except BaseException:
        catalogue.close()
        raise
    return local_folder(address.where), catalogue, blobs


def open_blobs(place: str | Path, hub: str) -> BlobStore:
    """The blobs at a URL or in a folder. `hub` is where their catalogue is; copies of remote blobs are kept under it."""
    if _scheme(place) in _FOLDERS:
        # a file:// URL is as durable as a folder, since it is one
        return FolderBlobs(Path(place if _scheme(place) is None else str(place).partition("://")[2]))
    from loraweave.hub.stores.remote_blobs import RemoteBlobs

    return RemoteBlobs(str(place), local_folder(f"{hub} {without_credentials(str(place))}"))


def local_folder(where: str) -> Path:
    """The folder of this machine for what can be fetched or made again of the hub at a place."""
    return cache_folder() / "hubs" / hashlib.sha256(where.encode()).hexdigest()[:32]


def _scheme(place: str | Path) -> str | None:
    found = _URL.match(place) if isinstance(place, str) else None
    return None if found is None else found[1].lower()
