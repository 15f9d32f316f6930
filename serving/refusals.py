"""Refusals, which clients get when there is no answer: OpenAI's error object and an HTTP status."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
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
STATUSES: tuple[tuple[type[LoraweaveError], int], ...] = (
    (AdapterNotFound, 404),
    (UnknownExpert, 404),
    (AdapterQuarantined, 403),
    (BudgetExceeded, 413),
    (HubLocked, 503),
    (WeightingError, 400),
    (AdapterUnsupported, 400),
    (CompositionError, 400),
    (InvalidLicense, 400),
    (InvalidName, 400),
    (RetrievalError, 400),
)
# where the hub is, which is not a client's business
PLACE = re.compile(r" in the hub .*?(?=[;:] |\n|$)")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


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
        for kind, status in STATUSES:
            if isinstance(told, kind):
                missing = status == 404
                message = PLACE.sub("", str(error))
                return Refusal(status, message, param="model", code="model_not_found" if missing else type(error).__name__)
    logger.error("a request failed", exc_info=error)
    return Refusal(500, f"{type(error).__name__}: the server's log has the cause", code=type(error).__name__)
