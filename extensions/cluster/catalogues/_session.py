"""A PostgreSQL session with the interface of the SQLite connection that the hub's statements are written for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from loraweave import HubCorrupt, HubError, HubFull, HubLocked, HubReadOnly, PackageMissing


class Translating:
    """A PostgreSQL session that takes statements with `?` for parameters, and counts the rows they change."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.num_changed = 0

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Any:
        cursor = self._session.execute(_translate(statement), tuple(parameters))
        if cursor.description is None:
            self.num_changed += max(0, cursor.rowcount)
        return cursor


@lru_cache(maxsize=256)
def _translate(statement: str) -> str:
    return statement.replace("%", "%%").replace("?", "%s")


# https://www.postgresql.org/docs/17/errcodes-appendix.html
_FULL = {"53100"}
_LOCKED = {"55P03", "40P01", "40001"}
_READ_ONLY = {"25006", "42501"}
_DAMAGED = {"XX001", "XX002"}
_NO_TEXT = {None, "22021", "22P05"}
_OTHER_SCHEMA = {"42P01", "42703", "42883", "42704"}


@contextmanager
def postgres_errors(address: PostgresAddress, doing: str) -> Iterator[None]:
    """Turn any psycopg.Error inside into a subclass of HubError, with the cause attached. `doing`: "adding 'x'"."""
    psycopg = require_psycopg()
    try:
        yield
    except UnicodeEncodeError as error:
        raise _unstorable(address, error, doing) from error
    except psycopg.Error as error:
        # psycopg itself refuses a text with NUL, which is no error of the server and has no code
        if isinstance(error, psycopg.DataError) and error.sqlstate in _NO_TEXT:
            raise _unstorable(address, error, doing) from error
        raise _error_for(address, error.sqlstate, address.redacted(str(error)), doing) from error


def _unstorable(address: PostgresAddress, error: Exception, doing: str) -> HubError:
    return HubError(
        f"{doing}: {address.where} cannot hold one of the texts ({address.redacted(str(error))}); nothing was changed. "
        "Leave NUL and lone surrogates out of it"
    )


def _error_for(address: PostgresAddress, code: str | None, said: str, doing: str) -> HubError:
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
            "Then try again: a lost connection is opened again"
        )
    return HubError(f"{doing}: {where} refused ({code}: {said})")


DEFAULT_SCHEMA = "loraweave"

# a schema's name is put into statements unquoted
_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True)
class PostgresAddress:
    """The address of a catalogue: `parameters` for psycopg, and `where` for messages, without a password."""

    parameters: dict[str, Any] = field(repr=False)
    schema: str
    where: str

    def redacted(self, text: str) -> str:
        """Return the text in one line and without the passwords."""
        for key in ("password", "sslpassword"):
            secret = self.parameters.get(key)
            if secret:
                text = text.replace(secret, "***").replace(quote(secret, safe=""), "***")
        return " ".join(text.split())


def read_address(url: str) -> PostgresAddress:
    """Return the address in a URL that libpq takes, plus `schema=name` for a hub in another schema than "loraweave".

    Raises HubError, which does not repeat the URL, if the URL cannot be read; PackageMissing without psycopg.
    """
    psycopg = require_psycopg()
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        rest = urlencode([(key, value) for key, value in options if key != "schema"], quote_via=quote)
        parameters = psycopg.conninfo.conninfo_to_dict(urlunsplit(parts._replace(query=rest)))
    except (ValueError, psycopg.ProgrammingError):
        # from None, and without the text: the part that cannot be read may be the password
        raise HubError(
            "the address of the hub's catalogue cannot be read; it has the form "
            "postgresql://user:password@host:5432/database?schema=loraweave, with % / ? # @ : in a password as %25 ..."
        ) from None
    schema = dict(options).get("schema", DEFAULT_SCHEMA)
    if not _SCHEMA_NAME.fullmatch(schema):
        raise HubError(
            f"the hub's schema is {schema!r:.80}; its name has lower case letters, digits and underscores, at most 63"
        )
    return PostgresAddress(parameters, schema, _message(parameters, schema))


def require_psycopg() -> Any:
    """Return the module psycopg. Raises PackageMissing, with the command that installs it, if it is missing."""
    try:
        import psycopg
        import psycopg.conninfo
    except ImportError as error:
        raise PackageMissing(
            "a catalogue on PostgreSQL needs psycopg 3: pip install 'loraweave[postgres]' "
            f"(or a hub in a folder, which needs nothing): {error}"
        ) from error
    return psycopg


def _message(parameters: dict[str, Any], schema: str) -> str:
    user = f"{parameters['user']}@" if parameters.get("user") else ""
    port = f":{parameters['port']}" if parameters.get("port") else ""
    shown = f"postgresql://{user}{parameters.get('host') or ''}{port}/{parameters.get('dbname') or ''}"
    return shown if schema == DEFAULT_SCHEMA else f"{shown}?schema={schema}"
