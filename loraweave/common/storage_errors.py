"""Conversion of what stores raise into the hub's own errors, once, at the room's edge."""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraweave.errors import HubCorrupt, HubError, HubFull, HubLocked, HubReadOnly

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


@contextmanager
def remote_errors(place: str, doing: str, *, writing: bool = False) -> Iterator[None]:
    """Raise a leaf of HubError for any failure inside but FileNotFoundError. `place` is a URL, `doing` a verb.

    Stores raise what the library below them does, which has no common root.
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
    """Raise a leaf of HubError, with the cause attached, for any OSError or sqlite3.Error inside. `doing`: "adding 'x'"."""
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
    """Return whether the database itself is at fault, and not its file system, its lock or the room for it."""
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
        # the file that readers share; SQLite names no cause, but it can fail to grow for one alone
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
