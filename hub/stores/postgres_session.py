"""A session of PostgreSQL as the connection that the hub's statements are written for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from loraweave.hub.stores.protocols import Cursor


class Translating:
    """A session that takes statements with `?` for parameters, and counts the rows they change."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.num_changed = 0

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor:
        cursor: Any = self._session.execute(_translated(statement), tuple(parameters))
        if cursor.description is None:
            self.num_changed += max(0, cursor.rowcount)
        found: Cursor = cursor
        return found


@lru_cache(maxsize=256)
def _translated(statement: str) -> str:
    return statement.replace("%", "%%").replace("?", "%s")
