"""Stored compositions: folders that a hub keeps under names, beside its adapters, without knowing their meaning.

A composition is any object that saves itself as a folder. Each of its files is a blob named by the sha256 of its bytes, and
a row of the catalogue lists them: a name never becomes a path, and a row is committed when all its files are stored.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from loraweave.common.checks import entry
from loraweave.common.files import file_digest, replacing, storage_errors
from loraweave.common.names import checked_name, near_misses, now, text_digest
from loraweave.errors import AdapterCorrupt, AdapterExists, AdapterNotFound, HubCorrupt, HubError, InvalidName
from loraweave.hub.listing import Listing
from loraweave.hub.stores.catalogue import state_row
from loraweave.hub.stores.folder_blobs import file_bytes
from loraweave.hub.stores.protocols import BlobStore, Connection

# a folder is a composition if it has exactly one of these files
RECIPES = ("composition.json", "formula.json", "joint.json", "router.json")
MAX_FILES = 10_000

_SELECT = "SELECT name, hash, record, sha256 FROM compositions"


@dataclass(frozen=True)
class CompositionRow:
    """A stored composition. `files` maps each path in its folder to (sha256, size in bytes)."""

    name: str
    created: str
    files: Mapping[str, tuple[str, int]]

    @property
    def hash(self) -> str:
        return text_digest(json.dumps(sorted((path, digest) for path, (digest, _) in self.files.items())))


class SavesFolder(Protocol):
    """An object that a hub can store as a composition: a Composition, a Formula, a router or a JointPool."""

    def save_pretrained(self, folder: Path, /) -> Path: ...


class StoredComposition:
    """A composition of a hub: its name, when it was saved, the hash of its content, and its files."""

    def __init__(self, row: CompositionRow, blobs: BlobStore) -> None:
        self._row = row
        self._blobs = blobs

    @property
    def name(self) -> str:
        return self._row.name

    @property
    def created(self) -> str:
        """The time when it was saved, ISO 8601 in UTC."""
        return self._row.created

    @property
    def hash(self) -> str:
        """The SHA-256 of the paths and bytes of its files; the name does not enter."""
        return self._row.hash

    @property
    def files(self) -> Mapping[str, int]:
        """The size in bytes of each of its files, by the path in its folder."""
        return {path: size for path, (_, size) in self._row.files.items()}

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """The JSON object in the one file named in RECIPES. Raises AdapterCorrupt if the file is damaged or missing."""
        (path,) = [path for path in RECIPES if path in self._row.files]
        try:
            content: Mapping[str, Any] = json.loads(self.read(path))
            return content
        except (ValueError, RecursionError) as error:
            raise AdapterCorrupt(f"{path} of composition {self.name!r} is no JSON ({error}); save it again") from error

    @property
    def formula(self) -> str | None:
        """The text of a stored formula; None for any other composition."""
        return entry(self.recipe, "formula", str)

    @property
    def report(self) -> Mapping[str, Any] | None:
        """The report of the candidates compared when it was composed, as JSON; None for a formula."""
        return self.recipe.get("report")

    def read(self, path: str) -> bytes:
        """Return the bytes of one of its files. Raises AdapterCorrupt if it is damaged or missing, KeyError if unknown."""
        return file_bytes(self._blobs, self._row.files[path][0], f"{path} of composition {self.name!r}")

    def write(self, folder: str | Path) -> Path:
        """Write the composition's files to a folder, replacing a composition there, and return the path.

        `Composition.from_pretrained` reads it. Raises AdapterExists if the folder holds anything else.
        """
        target = Path(folder)
        if target.exists() and not (target.is_dir() and (_recipe_in(target) or not any(target.iterdir()))):
            raise AdapterExists(f"{target} is a file, or holds something that is not a composition; name another folder")
        with replacing(target) as new:
            for path in self._row.files:
                place = new.joinpath(*_parts(path))
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(self.read(path))
        return target

    @contextmanager
    def unpacked(self) -> Iterator[Path]:
        """Yield a temporary folder with its files, which is deleted when the block ends."""
        with tempfile.TemporaryDirectory(prefix="loraweave-") as temporary:
            yield self.write(Path(temporary) / "composition")

    def __repr__(self) -> str:
        return f"StoredComposition({self.name!r}, hash={self.hash[:12]!r}, files={len(self._row.files)})"


class CompositionShelf(Listing):
    """A hub's listing with stored compositions. `Hub` adds the storing of adapters."""

    _blobs: BlobStore

    def save_composition(
        self, name: str, composition: SavesFolder | str | Path, *, replace: bool = False
    ) -> StoredComposition:
        """Store a Composition, a Formula, a router with its adapters, or the saved folder of any of them, under a name.

        Compositions have their own names, apart from those of the adapters; a formula names one by `@name`. Equal content
        under the same name is not stored again. An error leaves the composition unsaved. Raises AdapterExists for other
        content without `replace`, InvalidName, HubError for anything but a composition, and the errors of saving it.
        """
        checked = checked_name(name)
        doing = f"saving composition {checked!r}"
        with tempfile.TemporaryDirectory(prefix="loraweave-") as temporary:
            folder = _saved(composition, Path(temporary) / "composition")
            files = _files(folder)
            row = CompositionRow(checked, now(), {path: (digest, size) for path, (_, digest, size) in files.items()})
            with self._catalogue.locked(doing):
                with self._catalogue.reading() as connection:
                    old = find(connection, checked)
                if old is not None and old.hash != row.hash and not replace:
                    raise AdapterExists(
                        f"{doing}: the name stands for another composition, saved {old.created}; pass replace=True to have "
                        "this one in its place, or choose another name"
                    )
                with storage_errors(self._catalogue.where, doing):
                    _put(self._blobs, {digest: place for place, digest, _ in files.values()})
                if old is not None and old.hash == row.hash:
                    return StoredComposition(old, self._blobs)
                with self._catalogue.transaction(doing) as connection:
                    put(connection, row)
        return StoredComposition(row, self._blobs)

    def composition(self, name: str) -> StoredComposition:
        """Return the composition with that name. Raises AdapterNotFound, with near misses."""
        with self._catalogue.reading() as connection:
            with suppress(InvalidName):
                if (row := find(connection, checked_name(name))) is not None:
                    return StoredComposition(row, self._blobs)
            known = names(connection)
        close = near_misses(str(name), known)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {len(known)}, none of a like name"
        raise AdapterNotFound(f"no composition {name!a:.80} in the hub {self._catalogue.where}; {hint}")

    def compositions(self) -> list[StoredComposition]:
        """Return all compositions, in the order of their names."""
        with self._catalogue.reading() as connection:
            return [StoredComposition(row, self._blobs) for row in every(connection)]

    def remove_composition(self, name: str) -> None:
        """Take a composition out of the catalogue; its files stay until gc(). Raises AdapterNotFound, with near misses."""
        stored = self.composition(name)
        with self._catalogue.writing(f"removing composition {stored.name!r}") as connection:
            delete(connection, stored.name)

    def _composition_digests(self, doing: str) -> set[str]:
        """Return the sha256 of every file of the compositions. Raises HubCorrupt if a row is damaged or missing."""
        with self._catalogue.reading() as connection:
            listed = list(every(connection))
            (num_saved,) = state_row(connection, "num_compositions", self._catalogue.where)
        if len(listed) != num_saved:
            raise HubCorrupt(
                f"{doing}: the catalogue has the rows of {len(listed)} compositions, but {num_saved} were saved; nothing "
                "was deleted, and Hub.verify() lists what can still be read"
            )
        return {digest for row in listed for digest, _ in row.files.values()}


def _saved(composition: SavesFolder | str | Path, place: Path) -> Path:
    """Return the composition's folder: `composition` if it is a path, else `place` after saving it. Raises HubError."""
    if isinstance(composition, str | Path):
        if not _recipe_in(Path(composition)):
            raise HubError(
                f"{str(composition)!r:.80} is not a folder with {' or '.join(RECIPES)}; save_composition() takes a "
                "Composition, a formula read by lw.parse(text), a router, or the folder that one was saved to"
            )
        return Path(composition)
    if not callable(getattr(composition, "save_pretrained", None)):
        raise HubError(
            f"a {type(composition).__name__} is not a composition; pass a Composition, lw.parse(text), a router, or a folder"
        )
    # a router is saved together with its adapters
    getattr(composition, "save_whole", composition.save_pretrained)(place)
    if not _recipe_in(place):
        raise HubError(f"a {type(composition).__name__} is not a composition: it saves no {' or '.join(RECIPES)}")
    return place


def _recipe_in(folder: Path) -> bool:
    return sum((folder / path).is_file() for path in RECIPES) == 1


def _files(folder: Path) -> dict[str, tuple[Path, str, int]]:
    """Map each file's path in the folder to (place, sha256, size in bytes). Raises HubError for links and too many files."""
    files: dict[str, tuple[Path, str, int]] = {}
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            place = Path(where) / name
            if place.is_symlink():
                raise HubError(f"{place} is a link; a composition is stored without any")
            if name in names:
                path = place.relative_to(folder).as_posix()
                _parts(path)
                files[path] = place, file_digest(place), place.stat().st_size
        if len(files) > MAX_FILES:
            raise HubError(f"{folder} has more than {MAX_FILES} files; a composition has fewer")
    return files


def _put(blobs: BlobStore, places: Mapping[str, Path]) -> None:
    """Store the files, given by sha256, that are missing or damaged in the store. The caller holds the write lock."""
    missing = []
    for digest in places:
        if blobs.has(digest):
            with suppress(AdapterCorrupt, FileNotFoundError):
                blobs.require(digest, digest, "a stored file")
                blobs.settle(digest)
                continue
        missing.append(digest)
    blobs.put_many((digest, places[digest].read_bytes()) for digest in missing)


def _parts(path: str) -> tuple[str, ...]:
    """Return the parts of a relative path. Raises AdapterCorrupt if it could lead out of its folder."""
    parts = PurePosixPath(path).parts
    if not parts or any(part in ("..", "/") or "\\" in part or ":" in part or "\0" in part for part in parts):
        raise AdapterCorrupt(f"{path!r} is not a path inside the folder of a composition")
    return parts


def find(connection: Connection, name: str) -> CompositionRow | None:
    """Return the row with that name, or None. Raises HubCorrupt if it is damaged."""
    row = connection.execute(f"{_SELECT} WHERE name = ?", (name,)).fetchone()
    return None if row is None else _decode(row)


def every(connection: Connection) -> Iterator[CompositionRow]:
    """Yield all rows in the order of their names. Raises HubCorrupt at the first that is damaged."""
    for row in connection.execute(f"{_SELECT} ORDER BY name").fetchall():
        yield _decode(row)


def names(connection: Connection) -> list[str]:
    """Return the names in order, without reading the rows."""
    return [name for (name,) in connection.execute("SELECT name FROM compositions ORDER BY name").fetchall()]


def put(connection: Connection, row: CompositionRow) -> None:
    """Write a composition's row, replacing one of the same name. Its files must be in the store already."""
    delete(connection, row.name)
    text = json.dumps([row.name, row.created, row.files], sort_keys=True, separators=(",", ":"))
    connection.execute(
        "INSERT INTO compositions (name, hash, record, sha256) VALUES (?, ?, ?, ?)",
        (row.name, row.hash, text, text_digest(text)),
    )
    connection.execute("UPDATE state SET num_compositions = num_compositions + 1")


def delete(connection: Connection, name: str) -> None:
    """Remove the row with that name, if there is one. Its files stay for gc."""
    if connection.execute("SELECT 1 FROM compositions WHERE name = ?", (name,)).fetchone() is not None:
        connection.execute("DELETE FROM compositions WHERE name = ?", (name,))
        connection.execute("UPDATE state SET num_compositions = num_compositions - 1")


def _decode(found: tuple[Any, ...]) -> CompositionRow:
    name, content_hash, text, digest = found
    if not isinstance(text, str) or text_digest(text) != digest:
        raise HubCorrupt(f"the row of composition {name!r} in the catalogue is damaged; save the composition again")
    told, created, files = json.loads(text)
    row = CompositionRow(told, created, {path: (str(sha256), int(size)) for path, (sha256, size) in files.items()})
    if (told, row.hash) != (name, content_hash):
        raise HubCorrupt(f"the row of composition {name!r} in the catalogue is damaged: its record is of {told!r}")
    return row
