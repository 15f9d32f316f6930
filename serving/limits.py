"""The limits of a server and of its clients' keys, and its refusals: an HTTP status with OpenAI's error object."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import re
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from loraweave.errors import (
    AdapterNotFound,
    AdapterQuarantined,
    AdapterUnsupported,
    BudgetExceeded,
    CompositionError,
    HubLocked,
    InvalidLicense,
    InvalidName,
    LoraweaveError,
    RetrievalError,
    UnknownExpert,
    WeightingError,
)


def _without_text(record: logging.LogRecord) -> bool:
    """Give a record the places and types of its error and causes, which formatters write in place of texts with prompts."""
    error, told = record.exc_info[1] if record.exc_info else None, ""
    while error is not None:
        told += "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__ + "\n"
        error = error.__cause__ or error.__context__
    record.exc_text = told.rstrip()
    return True


logger = logging.getLogger(__name__)
logger.addFilter(_without_text)
# the id of the request that this context answers
CURRENT_REQUEST: ContextVar[str | None] = ContextVar("loraweave_request", default=None)

# the first match counts; clients never see the text of other errors, which may contain paths of this machine
STATUSES: tuple[tuple[tuple[type[LoraweaveError], ...], int], ...] = (
    ((AdapterNotFound, UnknownExpert), 404),
    ((AdapterQuarantined,), 403),
    ((BudgetExceeded,), 413),
    ((HubLocked,), 503),
    ((WeightingError, AdapterUnsupported, CompositionError, InvalidLicense, InvalidName, RetrievalError), 400),
)
# the hub's path in an error's text, which clients must not see
PLACE = re.compile(r" in the hub .*?(?=[;:] |\n|$)")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# the limits that may be 0
MAY_BE_ZERO = {"merges", "batch_invariant", "prefix_bytes", "token_seconds", "memory_bytes", "prompt_characters", "grace"}
MAY_BE_ZERO |= {"head_seconds", "body_seconds"}
MINUTE = 60.0
# the least characters of a key: fewer are guessed
MIN_CHARACTERS = 16


@dataclass(frozen=True)
class Limits:
    """The numbers of 1 or more above which a request waits or is refused. A row is one answer that is being generated.

    `rows` run at once (an average counts once for each member's prompt) and keep keys and values of `cache_tokens` tokens:
    the rows times the tokens of the longest, prompt and answer. `waiting` more rows may wait. An extension keeps prompts'
    beginnings for reuse, up to `prefix_bytes`, which may be 0. A request has at most `body_bytes`, asks for `choices`
    answers of `new_tokens` each, and ends after `seconds`; its formula has `formula_characters` and `adapters`. The engine
    keeps `loaded` unused adapters, and the server as many compositions. `merges` allows merges by a method;
    `batch_invariant` makes an answer's bits independent of other rows, by the extension `accelerators`. A step that gives
    every running row a token should take `token_seconds` at most: rows that would prolong it wait, and others may pass
    them a few times. `memory_bytes` limits keys and values, beginnings, and compositions that are made or loaded, together;
    0 stands for three quarters of the memory that is free when the server starts.

    A request's head has `head_bytes` and `head_seconds`, its body `body_seconds`; bodies that are being read have
    `reading_bytes` together, beyond which the one that began first is refused. There are at most `connections`. A prompt has
    `prompt_characters` (0: 16 for each token of the context). A server that stops lets answers run for `grace` seconds.
    """

    rows: int = 8
    cache_tokens: int = 32_768
    prefix_bytes: int = 1 << 28
    waiting: int = 64
    body_bytes: int = 1 << 20
    choices: int = 16
    new_tokens: int = 1024
    seconds: float = 600.0
    formula_characters: int = 1024
    adapters: int = 16
    loaded: int = 64
    merges: bool = True
    batch_invariant: bool = False
    token_seconds: float = float("inf")
    memory_bytes: float = 0
    head_bytes: int = 1 << 14
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    reading_bytes: int = 1 << 24
    connections: int = 512
    prompt_characters: int = 0
    grace: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in MAY_BE_ZERO else 1
            if not value >= least:
                raise ValueError(f"the limit {field.name!r} is {value}; it is a number of {least} or more")


class Turns:
    """Turns at a resource that one client at a time may use, shared among clients by the cost of their uses.

    A use begins, on a clock of costs, at the end of the client's last one or now, and the earliest beginning is next
    (start-time fair queuing, Goyal, Vin and Cheng 1996). One event loop uses it.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = count()
        self._is_taken = False

    @asynccontextmanager
    async def turn(self, client: str, cost: float) -> AsyncIterator[None]:
        """Wait for the client's turn, which lasts while the block runs."""
        begin = max(self._now, self._ends.get(client, 0.0))
        self._ends[client] = begin + cost
        come: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (begin, next(self._numbers), come))
        try:
            self._next()
            await come
            yield
        finally:
            if come.done() and not come.cancelled():
                self._is_taken = False
            come.cancel()
            self._next()

    def _next(self) -> None:
        while self._waiting and not self._is_taken:
            self._now, _, come = heappop(self._waiting)
            if not come.done():
                come.set_result(None)
                self._is_taken = True
        self._ends = {client: end for client, end in self._ends.items() if end > self._now}


class Refusal(Exception):
    """An HTTP error for a client, with a status of 400 or more. `param` names the faulty field, `code` the kind of error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the HTTP response: OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: BaseException) -> Refusal:
    """Return an exception as a Refusal; log a fault of the server, whose text the client does not get."""
    if isinstance(error, Refusal):
        return error
    # a formula's error about a missing name has the hub's error as its cause, which tells the status
    cause = error.__cause__ if isinstance(error, WeightingError) else None
    for told in (cause, error):
        for kinds, status in STATUSES:
            if isinstance(told, kinds):
                code = "model_not_found" if status == 404 else type(error).__name__
                return Refusal(status, PLACE.sub("", str(error)), param="model", code=code)
    logger.error("a request failed", exc_info=error, extra={"fields": {"request_id": CURRENT_REQUEST.get()}})
    return Refusal(500, f"{type(error).__name__}: the server's log has the cause", code=type(error).__name__)


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
        self._left = min(self._per_minute, self._left + (now - self._seen) * self._per_minute / MINUTE)
        self._seen = now
        if self._left < 1:
            wait = math.ceil((1 - self._left) * MINUTE / self._per_minute)
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
