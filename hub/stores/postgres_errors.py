"""Turns what PostgreSQL and psycopg raise into the hub's own errors, once, at the room's edge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loraweave.errors import HubCorrupt, HubError, HubFull, HubLocked, HubReadOnly
from loraweave.hub.stores.postgres_address import PostgresAddress, require_psycopg

# https://www.postgresql.org/docs/17/errcodes-appendix.html
_FULL = {"53100"}
_LOCKED = {"55P03", "40P01", "40001"}
_READ_ONLY = {"25006", "42501"}
_DAMAGED = {"XX001", "XX002"}
_NO_TEXT = {None, "22021", "22P05"}
_OTHER_SCHEMA = {"42P01", "42703", "42883", "42704"}


@contextmanager
def postgres_errors(address: PostgresAddress, doing: str) -> Iterator[None]:
    """Raises a leaf of HubError, with the cause attached, for any psycopg.Error inside. `doing`: "adding 'x'"."""
    psycopg = require_psycopg()
    try:
        yield
    except UnicodeEncodeError as error:
        raise _unstorable(address, error, doing) from error
    except psycopg.Error as error:
        # psycopg itself refuses a text with NUL, which is no error of the server and has no code
        if isinstance(error, psycopg.DataError) and error.sqlstate in _NO_TEXT:
            raise _unstorable(address, error, doing) from error
        raise _named(address, error.sqlstate, address.redacted(str(error)), doing) from error


def _unstorable(address: PostgresAddress, error: Exception, doing: str) -> HubError:
    return HubError(
        f"{doing}: {address.where} cannot hold one of the texts ({address.redacted(str(error))}); nothing was changed. "
        "Leave NUL and lone surrogates out of it"
    )


def _named(address: PostgresAddress, code: str | None, said: str, doing: str) -> HubError:
    where = address.where
    if code in _FULL:
        return HubFull(f"{doing}: the disk of {where} is full ({said}); nothing was changed, free some space and try again")
    if code in _LOCKED:
        return HubLocked(
            f"{doing}: another program holds what this needs in {where} ({said}); try again, or open the hub with a larger "
            "timeout_s"
        )
    if code in _READ_ONLY:
        return HubReadOnly(f"{doing}: {where} cannot be written ({said}); reading it may still work")
    if code in _DAMAGED:
        return HubCorrupt(f"{doing}: the database {where} is damaged ({said}); restore it from a dump")
    if code in _OTHER_SCHEMA:
        return HubCorrupt(f"{doing}: {where} does not have the tables of a hub ({said}); restore them from a dump")
    if code is None or code.startswith(("08", "57P")):
        return HubError(
            f"{doing}: no connection to {where} ({said}); nothing was changed. Is the server running and reachable? "
            "Then try again: a lost connection is opened anew"
        )
    return HubError(f"{doing}: {where} refused ({code}: {said})")
