"""What a server allows, and its refusals: OpenAI's error object with an HTTP status, where there is no answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
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

# the first that fits counts; of errors in none of them, a client hears nothing, since their text may name places here
STATUSES: tuple[tuple[tuple[type[LoraweaveError], ...], int], ...] = (
    ((AdapterNotFound, UnknownExpert), 404),
    ((AdapterQuarantined,), 403),
    ((BudgetExceeded,), 413),
    ((HubLocked,), 503),
    ((WeightingError, AdapterUnsupported, CompositionError, InvalidLicense, InvalidName, RetrievalError), 400),
)
# where the hub is, which is not a client's business
PLACE = re.compile(r" in the hub .*?(?=[;:] |\n|$)")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Limits:
    """The numbers of 1 or more above which a request waits or is refused. A row is one answer on its way.

    `rows` run at once, an average having one for each of its prompts, and keep at most `cache_tokens` keys and values:
    the rows times the longest of them, prompt and answer. `waiting` rows wait for it. An extension keeps beginnings that
    were read, up to `prefix_bytes`, which may be 0. A request has at most `body_bytes`, asks for `choices` answers of
    `new_tokens`, and is over after `seconds`, with whatever it is then; its model has `formula_characters` and
    `adapters`. `loaded` adapters stay in the engine after use, and the adapters of as many formulas in memory. `merges`
    says whether merges by a method are made, `batch_invariant` whether an answer has the same bits whatever runs beside
    it, which needs the extension `accelerators`. A step that gives every running row a token is to take `token_seconds`
    at most: rows that would make it longer wait, and others pass them a few times. `memory_bytes` are for keys and
    values, beginnings and adapters together (`Memory`).
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
    memory_bytes: float = float("inf")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("merges", "batch_invariant", "prefix_bytes", "token_seconds") else 1
            if not value >= least:
                raise ValueError(f"the limit {field.name!r} is {value}; it is a number of {least} or more")


class Refusal(Exception):
    """An answer with an HTTP status of 400 or more. `param` names the field at fault, `code` the kind for programs."""

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
        """The body of the answer, which is OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: BaseException) -> Refusal:
    """Return the refusal that an exception becomes. Log a server fault, and send the client a message without its text."""
    if isinstance(error, Refusal):
        return error
    # a formula that names what is not there says at which place, and comes from the error of the hub
    cause = error.__cause__ if isinstance(error, WeightingError) else None
    for told in (cause, error):
        for kinds, status in STATUSES:
            if isinstance(told, kinds):
                code = "model_not_found" if status == 404 else type(error).__name__
                return Refusal(status, PLACE.sub("", str(error)), param="model", code=code)
    logger.error("a request failed", exc_info=error)
    return Refusal(500, f"{type(error).__name__}: the server's log has the cause", code=type(error).__name__)
