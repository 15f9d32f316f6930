"""Reads a `postgresql://` URL: how to connect, which schema is the hub's, and what of it a message may show."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from loraweave.errors import HubError, PackageMissing

SCHEMES = ("postgresql://", "postgres://")
DEFAULT_SCHEMA = "loraweave"

# a schema's name goes into statements as it is
_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True)
class PostgresAddress:
    """`parameters` go to psycopg, `where` into messages: it has no password."""

    parameters: dict[str, Any] = field(repr=False)
    schema: str
    where: str

    def redacted(self, text: str) -> str:
        """The text, in one line and without the password."""
        for key in ("password", "sslpassword"):
            secret = self.parameters.get(key)
            if secret:
                text = text.replace(secret, "***").replace(quote(secret, safe=""), "***")
        return " ".join(text.split())


def read_address(url: str) -> PostgresAddress:
    """The address of a hub: what libpq takes in a URL, and `schema=name` for a hub in another schema than "loraweave".

    HubError, which does not repeat the URL, when it cannot be read; PackageMissing without psycopg.
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
    return PostgresAddress(parameters, schema, _shown(parameters, schema))


def require_psycopg() -> Any:
    """The module psycopg. PackageMissing, with the command that installs it, without."""
    try:
        import psycopg
        import psycopg.conninfo
    except ImportError as error:
        raise PackageMissing(
            "a catalogue on PostgreSQL needs psycopg 3: pip install 'loraweave[postgres]' "
            f"(or a hub in a folder, which needs nothing): {error}"
        ) from error
    return psycopg


def _shown(parameters: dict[str, Any], schema: str) -> str:
    user = f"{parameters['user']}@" if parameters.get("user") else ""
    port = f":{parameters['port']}" if parameters.get("port") else ""
    shown = f"postgresql://{user}{parameters.get('host') or ''}{port}/{parameters.get('dbname') or ''}"
    return shown if schema == DEFAULT_SCHEMA else f"{shown}?schema={schema}"
