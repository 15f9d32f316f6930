"""Opening the catalogue and the blobs of a hub, each of which may be on this machine or elsewhere.

A hub and the place of its blobs know each other's identity. Without that, two hubs that were given one bucket would each
delete the other's blobs as unused, and a hub whose disk is not mounted would look damaged.
"""

import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import loraweave.registry as registry
from loraweave.common.files import as_path, cache_folder, storage_errors, whole_file, without_credentials, write_new
from loraweave.common.names import text_digest
from loraweave.errors import HubCorrupt, HubError
from loraweave.hub.stores.catalogue import FILE, Catalogue, state_row
from loraweave.hub.stores.folder_blobs import FolderBlobs
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore, SharedCatalogue

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_FOLDERS = (None, "file", "local")
# the entry of the registry `blobs` that reads the URLs of all schemes that no entry is named after
FOR_ANY_SCHEME = "fsspec"
_FILE = "blobs.json"


def hub_exists(place: str) -> bool:
    """Return True if the folder `place` holds a hub, and for any URL, since only its server could tell."""
    return "://" in place or (Path(place) / FILE).is_file()


def open_stores(path: str | Path, blobs: str | Path | None, timeout_s: float) -> tuple[Path, CatalogueStore, BlobStore]:
    """Return (the hub's folder on this machine, its catalogue, its blobs). A remote hub has a folder in the cache.

    Raises HubError for a place of an unsupported kind; PackageMissing, with the command that installs the package.
    """
    as_path(path, "the hub")
    scheme = _scheme(path)
    blobs_place = None if blobs is None else str(blobs) if _scheme(blobs) else str(Path(blobs).absolute())
    if scheme is None:
        return _in_folder(Path(path), blobs_place, timeout_s)
    # libpq knows its own scheme by two names
    scheme = "postgresql" if scheme == "postgres" else scheme
    if scheme in registry.names("catalogues"):
        return _on_server(scheme, str(path), blobs_place, timeout_s)
    places = ["in a folder", *(f"at {name}://..." for name in registry.names("catalogues"))]
    raise HubError(
        f"a hub's catalogue is {' or '.join(places)}, not at {scheme}://; "
        f'a store of files takes its blobs: Hub("folder", blobs={without_credentials(str(path))!r})'
    )


def _in_folder(folder: Path, asked: str | None, timeout_s: float) -> tuple[Path, CatalogueStore, BlobStore]:
    claim = _read_claim(folder)
    local = FolderBlobs(folder)
    if claim is None and asked is None:
        return folder, Catalogue(folder, timeout_s, local), local
    _, noted = claim or ("", None)
    blobs = _at_one_place(asked, noted, str(folder), str(folder.absolute()))
    if claim is None and (blob := next(iter(local.names()), None)) is not None:
        raise HubError(f"the hub {folder} keeps its blobs in its own folder, such as {local.place(blob)}, not at {asked}")
    catalogue = Catalogue(folder, timeout_s, local if claim is None else blobs)
    with _closed_on_error(catalogue):
        if claim is None:
            with catalogue.locked("creating the hub"):
                claim = _read_claim(folder) or _write_claim(folder, asked or "")
        _settle(catalogue, blobs, claim[0])
    return folder, catalogue, blobs


def _on_server(scheme: str, url: str, asked: str | None, timeout_s: float) -> tuple[Path, CatalogueStore, BlobStore]:
    catalogue: SharedCatalogue = registry.get("catalogues", scheme)(url, timeout_s)
    with _closed_on_error(catalogue):
        identity, noted = catalogue.claim()
        if asked is None and noted is None:
            raise HubError(
                f"the hub at {catalogue.where} needs a place for its blobs, which are files: "
                f'Hub("{scheme}://...", blobs="s3://bucket/prefix"), or a folder that all its users see'
            )
        blobs = _at_one_place(asked, noted, catalogue.where, catalogue.where)
        _settle(catalogue, blobs, identity)
        # a folder may have another path on another machine
        if asked is not None and noted is None and catalogue.writable and _scheme(asked) not in _FOLDERS:
            catalogue.note_blobs(without_credentials(asked))
    return local_folder(catalogue.where), catalogue, blobs


@contextmanager
def _closed_on_error(catalogue: CatalogueStore) -> Iterator[None]:
    try:
        yield
    except BaseException:
        catalogue.close()
        raise


def _at_one_place(asked: str | None, noted: str | None, hub: str, where: str) -> BlobStore:
    """Return the store of blobs at the place `asked`, or at `noted` if that is None. Raises HubError if the two differ."""
    if asked is not None and noted is not None and without_credentials(asked) != noted:
        raise HubError(
            f"the blobs of the hub {hub} are at {noted}, not at {without_credentials(asked)}; open it without blobs=, or "
            "move them there first and correct the note (docs/extensions/cluster.md)"
        )
    return open_blobs(asked or noted or "", where)


def open_blobs(place: str | Path, hub: str) -> BlobStore:
    """Return the store of the blobs at a URL or in a folder. `hub`, the catalogue's place, names the cache for a URL."""
    scheme = _scheme(place)
    if scheme is None or scheme in _FOLDERS:
        # a file:// URL is as durable as a folder, since it is one
        return FolderBlobs(Path(place if scheme is None else str(place).partition("://")[2]))
    stores = registry.names("blobs")
    if not stores:
        raise HubError(f"nothing installed here reads {without_credentials(str(place))}: a folder can hold the blobs")
    make = registry.get("blobs", scheme if scheme in stores else FOR_ANY_SCHEME)
    store: BlobStore = make(str(place), local_folder(f"{hub} {without_credentials(str(place))}"))
    return store


def blobs_of(folder: Path) -> BlobStore:
    """Return the store of the blobs of the hub in a folder, which may note that they are elsewhere."""
    claim = _read_claim(folder)
    return FolderBlobs(folder) if claim is None else open_blobs(claim[1], str(folder.absolute()))


def local_folder(where: str) -> Path:
    """Return the cache folder on this machine of the hub at `where`; everything in it can be fetched or made again."""
    return cache_folder() / "hubs" / text_digest(where)[:32]


def _scheme(place: str | Path) -> str | None:
    hit = _URL.match(place) if isinstance(place, str) else None
    return None if hit is None else hit[1].lower()


def _read_claim(folder: Path) -> tuple[str, str] | None:
    """Return the (identity, place of the blobs) that a hub notes, or None if they are in its own folder.

    Raises HubCorrupt if the note is damaged.
    """
    path = folder / _FILE
    with storage_errors(path, "opening the hub"):
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        data = json.loads(text)
        return str(data["hub"]), str(data["blobs"])
    except (ValueError, KeyError, TypeError) as error:
        raise HubCorrupt(
            f'{path} is damaged ({error}); it says where the hub\'s blobs are: {{"hub": identity, "blobs": URL}}'
        ) from error


def _write_claim(folder: Path, place: str) -> tuple[str, str]:
    """Note where the blobs of a hub in a folder are, and return the note. The caller holds the lock."""
    identity, noted = uuid.uuid4().hex, without_credentials(place)
    with storage_errors(folder, "opening the hub"), whole_file(folder / _FILE) as temporary:
        write_new(temporary, json.dumps({"hub": identity, "blobs": noted}).encode())
    return identity, noted


def _settle(catalogue: CatalogueStore, blobs: BlobStore, identity: str) -> None:
    """Check that the blobs belong to the hub with this identity, and claim them for a new hub. Raises HubError otherwise."""
    owner = blobs.owner()
    if owner == identity:
        return
    root = blobs.root
    if owner is not None:
        raise HubError(
            f"the blobs at {root} belong to another hub ({owner}, not {identity}), whose adapters this one would take for "
            "unused; give the hub a place of its own, such as another prefix, or restore its catalogue from a dump"
        )
    with catalogue.reading() as connection:
        (num_adapters,) = state_row(connection, "num_adapters", catalogue.where)
    if num_adapters:
        raise HubError(
            f"the hub {catalogue.where} has {num_adapters} adapters, but {root} is not the place of their blobs; is it "
            "mounted, and is it the right bucket?"
        )
    if (blob := next(iter(blobs.names()), None)) is not None:
        raise HubCorrupt(
            f"{blobs.place(blob)} is a blob of a hub that is not this one; give the hub an empty place for its blobs"
        )
    if catalogue.writable:
        with catalogue.locked("opening the hub"):
            blobs.claim(identity)
