"""The keys of a server's clients: one for all of them, or those of a file, each with a name and limits of its own."""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from loraweave.errors import CompositionError
from loraweave.serving.limits import Refusal

SECONDS = 60.0
# fewer characters are guessed
MIN_CHARACTERS = 16


class KeyLimits(BaseModel):
    """A client's key, which it sends as its bearer token, and what the client may do; infinite limits refuse nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, Field(min_length=MIN_CHARACTERS, pattern=r"^[\x21-\x7e]+$")]
    requests_per_minute: Annotated[float, Field(ge=1)] = math.inf
    # compositions that are loaded or merged for this client's requests
    formulas_per_minute: Annotated[float, Field(ge=1)] = math.inf
    # answers that are prepared, run or wait at once
    rows: Annotated[float, Field(ge=1)] = math.inf


class KeyFile(RootModel[dict[str, KeyLimits]]):
    """A JSON file of keys by the clients' names."""


class Rate:
    """A limit of events per minute: a whole minute's allowance may be used at once, and it refills evenly."""

    def __init__(self, per_minute: float) -> None:
        self._per_minute = self._left = per_minute
        self._seen = time.monotonic()

    def take(self, what: str) -> None:
        """Count an event. Raises Refusal (429, with the seconds to wait) if the allowance is used up."""
        if self._per_minute == math.inf:
            return
        now = time.monotonic()
        self._left = min(self._per_minute, self._left + (now - self._seen) * self._per_minute / SECONDS)
        self._seen = now
        if self._left < 1:
            wait = math.ceil((1 - self._left) * SECONDS / self._per_minute)
            message = f"this key may ask for {self._per_minute:g} {what} a minute; ask again in {wait} s"
            raise Refusal(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})
        self._left -= 1


class KeyHolder:
    """Who holds a key: the name, and what its requests have used of the key's limits. One thread uses it."""

    def __init__(self, name: str, limits: KeyLimits | None = None) -> None:
        self.name = name
        self.num_rows = 0
        self._max_rows = math.inf if limits is None else limits.rows
        self.requests = Rate(math.inf if limits is None else limits.requests_per_minute)
        self.formulas = Rate(math.inf if limits is None else limits.formulas_per_minute)

    def take_rows(self, count: int, held: int = 0) -> int:
        """Count a request's `count` answers in place of the `held` that were counted before. Returns `count`.

        Raises Refusal if more answers would be prepared, run or wait at once than the key allows.
        """
        others = self.num_rows - held
        if others + count > self._max_rows:
            message = f"this key may have {self._max_rows:g} answers at once: {others} run or wait, {count} are new"
            raise Refusal(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self.num_rows = others + count
        return count


class Keys:
    """The keys that a server accepts. Without one, whoever reaches the server may use it."""

    def __init__(self, key: str | None = None, holders: Mapping[str, KeyLimits] = {}) -> None:
        if key is not None and not key.strip():
            raise CompositionError("the key is empty, so that anyone could send it; give a key, or none for loopback alone")
        self._holders = [(f"Bearer {limits.key}".encode(), KeyHolder(name, limits)) for name, limits in holders.items()]
        if key is not None:
            self._holders.append((f"Bearer {key}".encode(), KeyHolder("key")))
        self._anyone = KeyHolder("anyone")

    def holder(self, authorization: str) -> KeyHolder:
        """Return the holder of the key in an Authorization header. Raises Refusal (401) without an accepted key."""
        if not self._holders:
            return self._anyone
        scheme, _, token = authorization.partition(" ")
        sent = f"{scheme.capitalize()} {token.strip()}".encode()
        # all keys are compared, so that the time tells nothing
        matching = [holder for accepted, holder in self._holders if hmac.compare_digest(sent, accepted)]
        if not matching:
            message = "this server wants its key: Authorization: Bearer ..."
            raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return matching[0]


def read_keys(path: str | Path) -> dict[str, KeyLimits]:
    """Return the keys of a JSON file, {name: {"key": .., "requests_per_minute": .., "formulas_per_minute": .., "rows": ..}}.

    Raises CompositionError, whose text has no key, if the file cannot be read, a field is wrong, or two names share a key.
    """
    try:
        holders = KeyFile.model_validate_json(Path(path).read_bytes()).root
    except OSError as error:
        raise CompositionError(f"the file of keys {str(path)!r} cannot be read: {error.strerror}") from None
    except ValidationError as invalid:
        fault = invalid.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise CompositionError(f"{path}: {place or 'the file'}: {fault['msg']}") from None
    if not holders:
        raise CompositionError(f"{path} has no key")
    if len({limits.key for limits in holders.values()}) < len(holders):
        raise CompositionError(f"{path}: two names have the same key, so that their requests could not be told apart")
    return holders
