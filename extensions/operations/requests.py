"""The course of a request, reported when its response has ended: a record of `logging`, and spans of OpenTelemetry.

No part of a prompt or an answer is reported, and only the code of an error, since its text may quote the client.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from loraweave.extensions.operations.spans import open_tracer

logger = logging.getLogger("loraweave.requests")

Scope = MutableMapping[str, Any]
Messages = Callable[..., Awaitable[Any]]

# paths that probes ask for, of which nothing is told
SILENT = ("/health", "/ready", "/metrics")
# characters of a path, or of a model's name that stands for no formula
MOST_CHARACTERS = 200
# the status of a request whose client disconnected before its answer
CLIENT_GONE = 499
STREAMED_ERROR = b'data: {"error": '


def observed(app: Messages) -> Messages:
    """Return the ASGI application, wrapped to log each request but probes, and to send its spans to OpenTelemetry."""
    show_spans = open_tracer()

    async def answer(scope: Scope, receive: Messages, send: Messages) -> None:
        if scope["type"] != "http" or scope["path"] in SILENT:
            await app(scope, receive, send)
            return
        course = Course(scope)

        async def hear(message: Mapping[str, Any]) -> None:
            course.hear(message)
            await send(message)

        try:
            # a copy: the connection keeps its own scope, which must not keep the answer's adapters
            await app(course.scope, receive, hear)
        finally:
            fields = course.fields()
            logger.log(course.level, "%s %s %s", fields["method"], fields["path"], course.status, extra={"fields": fields})
            if show_spans is not None:
                show_spans(course, fields)

    return answer


class Course:
    """One request's times, and what its response says; `answer` is set once rows of a batch generate its texts."""

    def __init__(self, scope: Scope) -> None:
        self._record: dict[str, Any] = {}
        self.scope = {**scope, "state": dict(scope.get("state", {})), "record": self._record}
        # of `time.monotonic`, and its difference from Unix time, both in seconds
        self.begun = time.monotonic()
        self.since_1970 = time.time() - self.begun
        self.status = 500
        self._headers: dict[str, str] = {}
        self._error = ""
        self._is_whole = False

    @property
    def rows(self) -> list[Any]:
        """The rows of the batch that generated the answer's texts; none for a request without an answer."""
        return [choice.row for choice in self._record["answer"].choices] if "answer" in self._record else []

    @property
    def level(self) -> int:
        """The level of the log record: an error for a fault of the server, a warning where it could not answer."""
        return logging.ERROR if self.status == 500 else logging.WARNING if self.status > 500 else logging.INFO

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take in one message of the response: its status and headers, and in its body the code of an error."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
            return
        body = message.get("body", b"")
        self._is_whole = not message.get("more_body", False)
        if self.status >= 400 or body.startswith(STREAMED_ERROR):
            with suppress(ValueError, KeyError, TypeError):
                self._error = json.loads(body.removeprefix(b"data: "))["error"]["code"] or ""

    def fields(self) -> dict[str, Any]:
        """Return the request's fields for the log by name, without missing values."""
        now = time.monotonic()
        holder, answer = self.scope["state"].get("holder"), self._record.get("answer")
        fields: dict[str, Any] = {
            "method": self.scope["method"],
            "path": self.scope["path"][:MOST_CHARACTERS],
            "status": self.status,
            "request_id": self._headers.get("x-request-id"),
            "key": None if holder is None else holder.name,
            "formula": self._record.get("model", "")[:MOST_CHARACTERS] or None,
        }
        if answer is not None:
            usage = answer.usage()
            fields |= {"formula": answer.served.canonical, "identity": answer.served.identity}
            fields |= {"prompt_tokens": usage["prompt_tokens"], "new_tokens": usage["completion_tokens"]}
            fields["queue_s"] = max((row.begun - row.made for row in self.rows), default=math.nan)
            fields["first_token_s"] = min((row.first for row in self.rows), default=math.nan) - self.begun
        fields |= {"whole_s": now - self.begun, "end": self._end(answer)}
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in fields.items()
            if value is not None and not (isinstance(value, float) and math.isnan(value))
        }

    def _end(self, answer: Any) -> str:
        """Return why the response ended: an error's code, "gone", or how its texts ended, "stop" or "length"."""
        if self.status == CLIENT_GONE or not self._is_whole:
            return "gone"
        if self._error or self.status >= 400:
            return self._error or "refused"
        return "+".join(sorted({choice.finish or "cut" for choice in answer.choices})) if answer is not None else "ok"
