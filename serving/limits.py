"""The limits of a server, and its refusals: an HTTP status with OpenAI's error object instead of an answer."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from itertools import count
from typing import Any

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

logger = logging.getLogger(__name__)
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
