"""The figures that /metrics shows, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The figures of one server; each method notes what just happened."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self._registry, "namespace": "loraweave"}
        self._requests = Counter("requests", "HTTP requests by path and status", ["path", "status"], **known)
        self._seconds = Histogram(
            "request_seconds",
            "From a request to its answer, of a stream to its first token",
            ["path"],
            buckets=SECONDS,
            **known,
        )
        self._running = Gauge("running_rows", "Rows of the running batch", **known)
        self._waiting = Gauge("waiting_rows", "Rows that wait for the batch", **known)
        self._open = Gauge("open_requests", "Requests for answers that are not over", **known)
        self._prefix_bytes = Gauge("prefix_bytes", "Bytes of beginnings that are kept", **known)
        self._prompt_tokens = Counter("prompt_tokens", "Tokens read before a row's first new one", **known)
        self._kept_tokens = Counter("kept_tokens", "Tokens of prompts that were not read, since they are kept", **known)
        self._new_tokens = Counter("new_tokens", "Tokens chosen", **known)
        self._steps = Counter("steps", "Steps of the running batch", **known)
        self._ended = Counter("rows", "Rows that are over, by whether their client had gone", ["gone"], **known)
        for gone in ("true", "false"):
            # shown before the first
            self._ended.labels(gone)

    @contextmanager
    def request(self, path: str) -> Iterator[list[int]]:
        """Count a request and its seconds; the block puts the status of its answer into the list."""
        before, status = time.monotonic(), [500]
        try:
            yield status
        finally:
            self._requests.labels(path, str(status[0])).inc()
            self._seconds.labels(path).observe(time.monotonic() - before)

    def watch_rows(self, running: Callable[[], int], waiting: Callable[[], int], prefix_bytes: Callable[[], int]) -> None:
        """Show what these functions return: the rows that run and that wait, and the bytes of kept prefixes."""
        self._prefix_bytes.set_function(prefix_bytes)
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def watch_requests(self, num_open: Callable[[], int]) -> None:
        self._open.set_function(num_open)

    def read(self, num_tokens: int, num_kept: int, num_rows: int) -> None:
        self._prompt_tokens.inc(num_tokens)
        self._kept_tokens.inc(num_kept)
        self._new_tokens.inc(num_rows)

    def stepped(self, num_rows: int) -> None:
        self._steps.inc()
        self._new_tokens.inc(num_rows)

    def ended(self, *, gone: bool) -> None:
        self._ended.labels(str(gone).lower()).inc()

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._registry)
