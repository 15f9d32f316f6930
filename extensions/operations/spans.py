"""The spans of a request for OpenTelemetry: the whole, and for each answer the queue, the prompt and the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

# names of OpenTelemetry's conventions for what the log calls otherwise
NAMES = {
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "new_tokens": "gen_ai.usage.output_tokens",
    "formula": "gen_ai.request.model",
    "request_id": "loraweave.request_id",
    "key": "loraweave.key",
    "identity": "loraweave.identity",
    "end": "loraweave.end",
}
# parts of an answer, by the times of a row of the batch between which each lies
PARTS = (("queue", "made", "begun"), ("prompt", "begun", "first"), ("tokens", "first", "last"))


def open_tracer() -> Callable[[Any, Mapping[str, Any]], None] | None:
    """Return a function that sends a request's spans, from its `Course` and the log's fields; None without OpenTelemetry.

    They go where the process's tracer provider sends them, such as the one that `opentelemetry-instrument` sets.
    """
    try:
        from opentelemetry import propagate, trace
    except ModuleNotFoundError:
        return None
    tracer = trace.get_tracer("loraweave")

    def show(course: Any, fields: Mapping[str, Any]) -> None:
        def at(seconds: float) -> int:
            return int((course.since_1970 + seconds) * 1e9)

        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in course.scope["headers"]}
        attributes = {known: fields[name] for name, known in NAMES.items() if name in fields}
        name, kind = f"{fields['method']} {fields['path']}", trace.SpanKind.SERVER
        # the trace that the client's `traceparent` names, or a new one
        whole = tracer.start_span(name, propagate.extract(sent), kind, attributes, start_time=at(course.begun))
        inside = trace.set_span_in_context(whole)
        for row in course.rows:
            for part, begin, end in PARTS:
                times = getattr(row, begin), getattr(row, end)
                if not any(map(math.isnan, times)):
                    tracer.start_span(part, inside, start_time=at(times[0])).end(at(times[1]))
        if course.status >= 500:
            whole.set_status(trace.StatusCode.ERROR)
        whole.end(at(course.begun + fields["whole_s"]))

    return show
