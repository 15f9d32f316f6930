"""Which blobs belong to which hub: a place for blobs knows its hub's identity, and the hub knows the place.

Without this, two hubs that were given one bucket would each delete the other's blobs as unused, and a hub whose disk is not
mounted would look damaged.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from loraweave.errors import HubCorrupt, HubError
from loraweave.hub.stores.blob_files import replace_file
from loraweave.hub.stores.catalogue import require_row
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore
from loraweave.hub.stores.remote_errors import without_credentials
from loraweave.hub.stores.storage_errors import storage_errors

_FILE = "blobs.json"


@dataclass(frozen=True)
class Claim:
    """A hub's identity, and the place of its blobs where that is another than its own folder."""

    identity: str
    place: str


def read_claim(folder: Path) -> Claim | None:
    """What a hub in a folder noted about its blobs; None where they are in the folder itself."""
    path = folder / _FILE
    with storage_errors(path, "opening the hub"):
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        data = json.loads(text)
        return Claim(str(data["hub"]), str(data["blobs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise HubCorrupt(
            f'{path} is damaged ({error}); it says where the hub\'s blobs are: {{"hub": identity, "blobs": URL}}'
        ) from error


def write_claim(folder: Path, place: str) -> Claim:
    """Notes where the blobs of a hub in a folder are. The caller holds the lock."""
    claim = Claim(uuid.uuid4().hex, without_credentials(place))
    with storage_errors(folder, "opening the hub"):
        replace_file(folder / _FILE, json.dumps({"hub": claim.identity, "blobs": claim.place}).encode())
    return claim


def require_place(given: str, noted: str, hub: str) -> None:
    """HubError when the hub's blobs are in another place than the one given."""
    if without_credentials(given) != noted:
        raise HubError(
            f"the blobs of the hub {hub} are at {noted}, not at {without_credentials(given)}; open it without blobs=, or "
            "move them there first and correct the note (docs/stores.md)"
        )


def settle(catalogue: CatalogueStore, blobs: BlobStore, identity: str) -> None:
    """Lets the blobs belong to the hub of that identity. HubError when they are another's or not there."""
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
        (num_adapters,) = require_row(connection.execute("SELECT num_adapters FROM state").fetchone(), catalogue.where)
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
