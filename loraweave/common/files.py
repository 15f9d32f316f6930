"""Files and folders that appear whole (written beside the target, synced, renamed), and storage errors as a hub's errors.

All packages save this way. A user's YAML is read here, too.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from loraweave.common.process import holding
from loraweave.errors import AdapterExists, HubCorrupt, HubError, HubFull, HubLocked, HubReadOnly, LoraweaveError

# far above what a person writes
MAX_YAML_BYTES = 2**20


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; the file durably replaces `target` when the block ends.

    Readers of `target` see the old file or the complete new one; an error in the block leaves the old one. Raises OSError if
    the file system fails, also for a folder that does not exist.
    """
    temporary = target.with_name(f".{uuid.uuid4().hex}.unfinished")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        remove_file(temporary)
        raise
    sync(target.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a new file, readable by its owner alone until it is complete, and by all afterwards."""
    # exclusive: the name cannot be guessed, and a planted file is not followed
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fchmod(descriptor, 0o444)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Return the cache folder, $LORAWEAVE_CACHE or else loraweave in ~/.cache: no other is written to unasked."""
    configured = os.environ.get("LORAWEAVE_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraweave"


def as_path(value: object, what: str, error: type[LoraweaveError] = HubError) -> Path:
    """Return `value` as a path. Raises `error` unless it is a text or a path; `what` names the argument in the message."""
    if not isinstance(value, str | PathLike):
        raise error(f"{what} is {value!r:.80}; give its path")
    return Path(value)


_syncing = ContextVar("_syncing", default=True)


def unsynced() -> AbstractContextManager[None]:
    """Disable this thread's `sync` inside the context: for files that are synced later, or made again if missing."""
    return holding(_syncing, False)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to the disk, so that they survive a power failure."""
    if not _syncing.get():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a temporary file if possible."""
    try:
        os.unlink(path)
    except OSError:
        # the original error is the one to report; the next opening sweeps the file
        return


def require_replaceable(folder: Path, is_own: Callable[[Path], bool]) -> Path:
    """Return the folder to replace: `folder`, or the folder that it links to. `is_own` is True of entries that may be lost.

    Raises AdapterExists if there is a file, or a folder with any other entry.
    """
    target = folder.resolve() if folder.is_symlink() else folder
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise AdapterExists(f"{target} is a file; give a folder that does not exist, is empty, or holds an adapter")
    foreign = sorted(entry.name for entry in target.iterdir() if not is_own(entry))
    if foreign:
        raise AdapterExists(
            f"{target} holds {len(foreign)} entries that are not part of an adapter ({', '.join(foreign[:3])}); "
            "replacing it would lose them, so give another folder"
        )
    return target


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write into, which takes the place of `target` when the block ends without an error.

    Its files are synced first. The old folder is removed after the new one is in place, and restored if renaming fails;
    after an error in the block, `target` is unchanged. Raises HubFull for a full disk, HubReadOnly where nothing can be
    written, HubError for another failure of the file system.
    """
    token = secrets.token_hex(8)
    new, old = target.parent / f".loraweave-{token}.tmp", target.parent / f".loraweave-{token}.old"
    try:
        with storage_errors(target, "writing a folder"):
            target.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            yield new
            for path in new.rglob("*"):
                if path.is_file():
                    sync(path)
            replaces = target.exists()
            if replaces:
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if replaces:
                    old.rename(target)
                raise
            if replaces:
                shutil.rmtree(old, ignore_errors=True)
    finally:
        with suppress(OSError):
            shutil.rmtree(new)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# {(path, modification time, size, inode): sha256}
_digests: dict[tuple[str, int, int, int], str] = {}
_digests_lock = threading.Lock()


def known_digest(path: Path, *, trust_cache: bool = True) -> str:
    """Return the sha256 of a file. An unchanged file is read once per process, unless `trust_cache` is off."""
    status = path.lstat()
    stamp = (str(path), status.st_mtime_ns, status.st_size, status.st_ino)
    with _digests_lock:
        known = _digests.get(stamp) if trust_cache else None
    if known is None:
        known = file_digest(path)
        with _digests_lock:
            _digests[stamp] = known
    return known


def read_yaml(path: Path, error: type[LoraweaveError]) -> dict[str, Any]:
    """Read a YAML file that holds a mapping of texts to plain values; aliases and repeated keys are refused.

    Raises `error`, with the line, for anything else.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise error(f"{path} has {path.stat().st_size} bytes, above the limit of {MAX_YAML_BYTES}")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_plain_loader(yaml))
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read ({problem}); give a YAML file") from problem
    except yaml.YAMLError as problem:
        raise error(f"{path} is not YAML: {' '.join(str(problem).split())}") from problem
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise error(f"{path} holds {content!r:.60}; its lines must be 'key: value'")
    return dict(content)


@cache
def _plain_loader(yaml: Any) -> Any:
    """Return a YAML loader that refuses aliases, which could expand without limit, and repeated keys."""

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(
                    problem="aliases are not read: write the value out", problem_mark=self.peek_event().start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    # YAML 1.1 reads 1e-3 as a text
    Plain.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789"))

    return Plain


_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


def without_credentials(text: str) -> str:
    """Cut user names and passwords out of the URLs in a text."""
    return _CREDENTIALS.sub("", text)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_PASSING = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
}
_WAY_OUT = "Hub.verify() lists what can still be read, and docs/extensions/upkeep.md says how to rebuild a catalogue of it"


@contextmanager
def storage_errors(path: Path | str, doing: str) -> Iterator[None]:
    """Turn an OSError or sqlite3.Error of the block into a HubError, which begins with `doing`, such as "adding 'x'"."""
    try:
        yield
    except HubError:
        # some of them are OSErrors too, and say already what happened
        raise
    except sqlite3.Error as error:
        raise _from_sqlite(error, path, doing) from error
    except UnicodeDecodeError as error:
        # sqlite3 lets it through from a damaged name in the schema
        raise HubCorrupt(f"{doing}: the catalogue {path} is damaged ({error.reason}); {_WAY_OUT}") from error
    except UnicodeEncodeError as error:
        raise HubError(
            f"{doing}: {path} cannot hold one of the texts ({error}); nothing was changed. Leave lone surrogates out of it"
        ) from error
    except OSError as error:
        raise _from_os(error, path, doing) from error


def is_damage(error: sqlite3.Error) -> bool:
    """Return True if an error means a damaged database, and not a failed file system, a lock or a full disk."""
    return _code(error) not in _PASSING


def _from_os(error: OSError, path: Path | str, doing: str) -> HubError:
    if error.errno in _FULL:
        return HubFull(f"{doing}: no space left below {path} ({error}); nothing was changed, free some space and try again")
    if error.errno in _READ_ONLY:
        return HubReadOnly(f"{doing}: {path} cannot be written ({error}); reading it still works")
    return HubError(f"{doing}: the file system failed below {path} ({error})")


def _from_sqlite(error: sqlite3.Error, path: Path | str, doing: str) -> HubError:
    code = _code(error)
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_SHMSIZE:
        # the file that readers share could not grow: SQLite names no cause, but only a full disk can be one
        return HubFull(
            f"{doing}: no space left below {path} ({error}): SQLite needs 32 kB beside a catalogue to read it when nobody "
            "else does; free some space and try again"
        )
    if code == sqlite3.SQLITE_FULL:
        return HubFull(f"{doing}: no space left below {path} ({error}); nothing was changed, free some space and try again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return HubLocked(
            f"{doing}: another program holds {path} ({error}); try again, or open the hub with a larger timeout_s"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return HubReadOnly(f"{doing}: {path} cannot be written ({error}); reading it still works")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT) or "decode" in str(error):
        return HubCorrupt(f"{doing}: the catalogue {path} is damaged ({error}); {_WAY_OUT}")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        return HubError(f"{doing}: the file system failed at {path} ({error})")
    return HubCorrupt(f"{doing}: the catalogue {path} does not behave as one ({error}); {_WAY_OUT}")


def _code(error: sqlite3.Error) -> int:
    # the low byte is the primary code, the rest refines it
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
