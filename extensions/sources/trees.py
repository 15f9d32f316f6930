"""Adding every adapter in a tree of folders to the hub, named after its path; the report lists refusals with reasons."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraweave import (
    Adapter,
    AdapterExists,
    AdapterNotFound,
    AdapterSuspicious,
    Hub,
    HubCorrupt,
    HubError,
    HubFull,
    HubLocked,
    HubReadOnly,
    InvalidName,
    LoraweaveError,
    Record,
)
from loraweave.extend import (
    MAX_NAME_CHARACTERS,
    WorkersFailed,
    checked_name,
    get,
    processes_here,
    storage_errors,
    text_digest,
    tracked,
)
from loraweave.extend.formats import is_adapter
from loraweave.extend.hubs import Addition, checked_policy
from loraweave.extensions.sources.sources.archives import archive_suffix

# a fault of the hub, not of one adapter, ends the walk; the next call resumes there
_ENDING = (HubFull, HubLocked, HubReadOnly, HubCorrupt)
_TAG_CHARACTERS = 8
# the number of sources that `Hub.add_many` stores at once
MAX_BATCH = 256
# how many sources workers get at once; the journal lists them only when all are added
MAX_SPREAD = 4096


@dataclass(frozen=True)
class TreeReport:
    """The outcome for every adapter in a tree, in order of paths; `entries` have path, state, name, hash and why.

    A state is "added", "updated" (a next version, since the files changed), "present", "refused" or, in a dry run, "found".
    """

    root: Path
    entries: tuple[Noted, ...] = field(default=())

    def of(self, state: str) -> tuple[Noted, ...]:
        return tuple(entry for entry in self.entries if entry.state == state)

    def counts(self) -> dict[str, int]:
        """Return the number of entries in each state that occurs."""
        states = ("added", "updated", "present", "found", "refused")
        return {state: len(self.of(state)) for state in states if self.of(state)}

    def to_json(self) -> dict[str, Any]:
        entries = [{key: value for key, value in vars(entry).items() if key != "stamp" and value} for entry in self.entries]
        return {"root": str(self.root), "counts": self.counts(), "entries": entries}


def add_tree(
    hub: Hub,
    root: str | Path,
    *,
    prefix: str = "",
    tags: Collection[str] = (),
    license: str | None = None,
    anomalies: str | Mapping[str, str] = "report",
    dry_run: bool = False,
    n_jobs: int | None = None,
    progress: bool = False,
) -> TreeReport:
    """Add every folder, LoRA file and archive at or below `root` that is an adapter; links are not followed.

    A name is `prefix` and the path, with a part of the path's hash if another adapter has the name. A second call, also
    after an interruption, reads only what has changed since, also of refused adapters. `dry_run` only finds and names.
    `n_jobs` workers, or those that `joblib.parallel_config` names, read new adapters, as in `Hub.add_many`; they must see
    the tree at the same path. Raises AdapterNotFound for a tree without adapters, and any fault of the hub itself.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise AdapterNotFound(f"cannot add the adapters below {str(root)!r}: it is not a folder")
    unread: list[OSError] = []
    sources = tree_sources(folder, unread.append)
    if not sources and not unread:
        raise AdapterNotFound(f"no folder or archive at or below {str(root)!r} holds an adapter")
    options = {"tags": sorted(tags), "license": license, "prefix": prefix, "anomalies": checked_policy(anomalies)}
    journal = TreeJournal(hub.path, folder)
    walk = _Walk(hub, folder, prefix, options, {} if dry_run else journal.read(), n_jobs, progress)
    entries = []
    for error in unread:
        path = os.path.relpath(error.filename or folder, folder)
        entries.append(Noted(path, "", "refused", "", why=f"the folder cannot be read: {error.strerror}"))
    for source in tracked(sources, "adapters", total=len(sources), shown=progress):
        if dry_run:
            entries.append(walk.find(source))
            continue
        for entry in walk.take(source):
            entries.append(entry)
            if walk.known.get(entry.path) != entry:
                journal.write(entry)
    for entry in walk.settle():
        entries.append(entry)
        journal.write(entry)
    return TreeReport(folder, tuple(sorted(entries, key=lambda entry: entry.path)))


@dataclass
class _Walk:
    """The state of one walk: the hub and options, `known` notes of earlier walks by path, and this walk's {name: path}."""

    hub: Hub
    root: Path
    prefix: str
    options: Mapping[str, Any]
    known: Mapping[str, Noted]
    n_jobs: int | None
    progress: bool
    path_of: dict[str, str] = field(default_factory=dict)
    # sources whose names are new, until their batch is added; each with its line of the report
    waiting: list[tuple[Path, Noted]] = field(default_factory=list)

    @cached_property
    def _is_spread(self) -> bool:
        return processes_here(self.n_jobs) is not None

    def find(self, source: Path) -> Noted:
        path = self._path(source)
        name, other = self._names(path)
        name = other if name in self.path_of else name
        self.path_of[name] = path
        return Noted(path, "", "found", name)

    def take(self, source: Path) -> list[Noted]:
        """Read one source unless it is unchanged; return the outcomes that are now known: its own, or its whole batch's."""
        path = self._path(source)
        try:
            now = stamp(source, self.options)
        except OSError as error:
            return [Noted(path, "", "refused", "", why=f"it cannot be read: {error}")]
        before = self.known.get(path)
        if before is not None and before.stamp == now:
            refused = before.state == "refused"
            if refused or ((record := self._record(before.name)) is not None and record.hash == before.hash):
                self.path_of[before.name] = path
                return [replace(before, state="refused" if refused else "present")]
        try:
            done = self._read(source, path, now, before)
        except _ENDING:
            raise
        except HubError as error:
            return [_refusal(path, now, self._names(path)[0], error)]
        most = MAX_SPREAD if self._is_spread else MAX_BATCH
        return [*done, *(self.settle() if len(self.waiting) >= most else [])]

    def settle(self) -> list[Noted]:
        """Add the waiting sources to the hub in one batch and return the outcome of each."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return []
        tags, license = self.options["tags"], self.options["license"]
        additions = [Addition(source.absolute(), noted.name, tags=tags, license=license) for source, noted in waiting]
        settings = {"anomalies": self.options["anomalies"], "n_jobs": self.n_jobs}
        added = self.hub.add_many(additions, **settings, progress=self.progress and self._is_spread)
        there = {record.name: record for record in added.records}
        errors = dict(added.refused)
        return [
            replace(noted, hash=there[noted.name].hash, why=_oddities(there[noted.name]))
            if noted.name in there
            else _refusal(noted.path, noted.stamp, noted.name, errors[noted.name])
            for _, noted in waiting
        ]

    def _read(self, source: Path, path: str, now: str, before: Noted | None) -> list[Noted]:
        """Return [the outcome of the source at `path`], or [] if it is new and waits to be added with a batch.

        `now` is its digest, `before` its note of an earlier walk. AdapterExists if both its names are other adapters'.
        """
        adapter: Adapter | None = None
        for name in self._names(path):
            record = self._record(name)
            if self.path_of.get(name, path) != path:
                continue
            if record is None:
                self.path_of[name] = path
                self.waiting.append((source, Noted(path, now, "added", name)))
                return []
            adapter = adapter or Adapter.from_pretrained(source)
            if record.hash == adapter.hash:
                self.path_of[name] = path
                return [Noted(path, now, "present", name, adapter.hash)]
            if before is not None and (before.name, before.hash) == (name, record.hash):
                self.path_of[name] = path
                tags, license, anomalies = (self.options[key] for key in ("tags", "license", "anomalies"))
                added = self.hub.add(adapter, name=name, tags=tags, license=license, replace=True, anomalies=anomalies)
                assert isinstance(added, Record)
                return [Noted(path, now, "updated", name, adapter.hash, _oddities(added))]
        names = " and ".join(map(repr, self._names(path)))
        raise AdapterExists(f"{path!r}: the names {names} stand for other adapters; give a prefix")

    def _record(self, name: str) -> Record | None:
        return self.hub.record(name) if name in self.hub else None

    def _path(self, source: Path) -> str:
        # a byte that is not text is shown escaped, which gives a name that can be stored
        return os.fsencode(source.relative_to(self.root)).decode("utf-8", "backslashreplace")

    def _names(self, path: str) -> tuple[str, str]:
        """Return (name of a path, name to use if another adapter has the first)."""
        stem = (
            self.root.resolve().name if path == "." else path.removesuffix(archive_suffix(path)).removesuffix(".safetensors")
        )
        shown = "".join("_" if unicodedata.category(letter)[0] == "C" else letter for letter in f"{self.prefix}{stem}")
        tag = f"~{text_digest(path)[:_TAG_CHARACTERS]}"
        short = unicodedata.normalize("NFC", shown).strip() or "adapter"
        tagged = f"{short[-(MAX_NAME_CHARACTERS - len(tag)) :].strip()}{tag}"
        try:
            return (short if checked_name(short) == short else tagged), tagged
        except InvalidName:
            return tagged, tagged


def _refusal(path: str, now: str, name: str, error: LoraweaveError) -> Noted:
    # refused because of the hub or the workers, not the files: the next walk tries again
    now = "" if isinstance(error, AdapterExists | AdapterSuspicious | WorkersFailed) else now
    return Noted(path, now, "refused", name, why=f"{type(error).__name__}: {error}")


def _oddities(record: Record) -> str:
    oddities = "; ".join(f"{anomaly.kind}: {anomaly.detail}" for anomaly in record.anomalies)
    return f"in quarantine: {oddities}" if record.quarantined else oddities


# the longest line of one adapter; longer ones come from a damaged journal
_MAX_LINE_BYTES = 100_000


@dataclass(frozen=True)
class Noted:
    """The note of an adapter: its path in the tree, the stamp of its files, and the outcome."""

    path: str
    stamp: str
    state: str
    name: str
    hash: str = ""
    why: str = ""


class TreeJournal:
    """The file of one tree's notes, the last of each path being valid. Without it, everything is read again."""

    def __init__(self, hub_folder: Path, root: Path) -> None:
        key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self.path = hub_folder / "trees" / f"{key}.jsonl"

    def read(self) -> dict[str, Noted]:
        """Return {path: note}, without lines that cannot be read, such as the last of a killed process."""
        notes: dict[str, Noted] = {}
        reading = storage_errors(self.path, "reading what was added of the tree")
        with reading, suppress(FileNotFoundError), self.path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                with suppress(ValueError, TypeError, AttributeError):
                    noted = Noted(**{key: str(value) for key, value in json.loads(line).items()})
                    notes[noted.path] = noted
        return notes

    def write(self, noted: Noted) -> None:
        """Append a note. It is not synced to the disk, since losing it costs only another reading."""
        with storage_errors(self.path, "noting what was added of the tree"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({key: value for key, value in vars(noted).items() if value}) + "\n"
            with self.path.open("a", encoding="ascii") as file:
                file.write(line)


def stamp(source: Path, options: Mapping[str, Any]) -> str:
    """Return a digest of names, sizes and times of a source's own files, of the options, and of loraweave's version."""
    entries = [source] if source.is_file() else sorted(source.iterdir())
    files = ((entry.name, entry.stat() if entry.exists() else entry.lstat()) for entry in entries if not entry.is_dir())
    seen = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return text_digest(repr((version("loraweave"), sorted(options.items()), seen)))[:32]


def tree_sources(root: Path, unread: Callable[[OSError], None]) -> list[Path]:
    """Return every folder at or below `root` that is an adapter, every LoRA file and archive, sorted, without links.

    `unread` is called with the error of a folder that cannot be listed.
    """
    sources, peft = [], get("formats", "peft")
    for path, folders, files in os.walk(root, onerror=unread):
        # version control has thousands of folders and no adapters
        folders[:] = [name for name in folders if name != ".git"]
        here = Path(path)
        files_of_weights = [here / name for name in files if name.endswith(".safetensors")]
        # each LoRA file in a folder is an adapter, and keeps its name when another file is added
        loras = [] if peft.recognises(here) else [file for file in files_of_weights if _is_plain(file) and is_adapter(file)]
        if loras:
            sources += loras
        elif is_adapter(here):
            sources.append(here)
        sources += [here / name for name in files if archive_suffix(name) and _is_plain(here / name)]
    return sorted(sources, key=lambda source: source.relative_to(root).parts)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
