"""The figures of a server that /metrics shows, in Prometheus' text format."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from loraweave.extend.serving import Metrics

WATCHED = {
    "running_rows": "Rows of the running batch",
    "waiting_rows": "Rows that wait for the batch",
    "open_requests": "Requests for answers that are not over",
    "prefix_bytes": "Bytes of beginnings that are kept",
    "expert_bytes": "Bytes of adapters and routers that are loaded, but for merges",
    "merge_bytes": "Bytes of merges that are loaded",
    "row_bytes": "Bytes of running rows at their longest: keys, values and what kernels copy",
    "making_bytes": "Bytes of compositions that are being made",
    "merges": "Merges that are loaded",
    "prefixes": "Beginnings that are kept",
}
# the last are beyond the deadline that a server has by default, 600 s
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600, 1200, 3600)
TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 30)


class PrometheusMetrics(Metrics):
    """The figures of one server, for Prometheus."""

    content_type = CONTENT_TYPE_LATEST

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
        self._prompt_tokens = Counter("prompt_tokens", "Tokens read before a row's first new one", **known)
        self._kept_tokens = Counter("kept_tokens", "Tokens of prompts that were not read, since they are kept", **known)
        self._new_tokens = Counter("new_tokens", "Tokens chosen", **known)
        self._steps = Counter("steps", "Steps of the running batch", **known)
        self._ended = Counter("rows", "Rows that are over, by whether their client had gone", ["gone"], **known)
        for gone in ("true", "false"):
            # zero is shown before the first
            self._ended.labels(gone)
        self._queue = Histogram("queue_seconds", "A row's wait for the batch", buckets=SECONDS, **known)
        text = "From a row's making to its first token"
        self._first = Histogram("first_token_seconds", text, buckets=SECONDS, **known)
        text = "Seconds of a token after the first, the mean of each row"
        self._per_token = Histogram("token_seconds", text, buckets=TOKEN_SECONDS, **known)
        self._whole = Histogram("answer_seconds", "From a row's making to its last token", buckets=SECONDS, **known)
        ProcessCollector(registry=self._registry)
        self._watched = {name: Gauge(name, text, **known) for name, text in WATCHED.items()}

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def watch(self, **figures: Callable[[], int]) -> None:
        for name, figure in figures.items():
            self._watched[name].set_function(figure)

    def read(self, num_tokens: int, num_kept: int, num_rows: int) -> None:
        self._prompt_tokens.inc(num_tokens)
        self._kept_tokens.inc(num_kept)
        self._new_tokens.inc(num_rows)

    def stepped(self, num_rows: int) -> None:
        self._steps.inc()
        self._new_tokens.inc(num_rows)

    def ended(self, row: Any) -> None:
        self._ended.labels(str(row.gone).lower()).inc()
        if not row.tokens:
            # it left, or its time was up, before it had an answer
            return
        self._queue.observe(row.begun - row.made)
        self._first.observe(row.first - row.made)
        self._whole.observe(row.last - row.made)
        if len(row.tokens) > 1:
            self._per_token.observe((row.last - row.first) / (len(row.tokens) - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)
