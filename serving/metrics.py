"""What a server measures: the figures of /metrics, in Prometheus' text format, and the time of its steps."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from scipy.optimize import nnls

from loraweave.composer.live.kernels._parts import Workload, costs
from loraweave.hub.adapter import Adapter
from loraweave.serving.row import Row

CONTENT_TYPE = CONTENT_TYPE_LATEST
WATCHED = {
    "running_rows": "Rows of the running batch",
    "waiting_rows": "Rows that wait for the batch",
    "open_requests": "Requests for answers that are not over",
    "prefix_bytes": "Bytes of beginnings that are kept",
}
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# the number of steps that are remembered, and of steps that the first guess weighs as much as
NUM_STEPS, GUESS = 256, 1.0
# an update takes what it is priced at
COEFFICIENTS = (0.0, 0.0, 1.0)

# {(inputs, outputs) of a layer: (how many such layers, mean rank in them)}
Ranks = dict[tuple[int, int], tuple[int, int]]


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
        self._prompt_tokens = Counter("prompt_tokens", "Tokens read before a row's first new one", **known)
        self._kept_tokens = Counter("kept_tokens", "Tokens of prompts that were not read, since they are kept", **known)
        self._new_tokens = Counter("new_tokens", "Tokens chosen", **known)
        self._steps = Counter("steps", "Steps of the running batch", **known)
        self._ended = Counter("rows", "Rows that are over, by whether their client had gone", ["gone"], **known)
        for gone in ("true", "false"):
            # shown before the first
            self._ended.labels(gone)
        self._watched = {name: Gauge(name, text, **known) for name, text in WATCHED.items()}

    @contextmanager
    def request(self, path: str) -> Iterator[list[int]]:
        """Count a request and its seconds; the block puts the status of its answer into the list."""
        before, status = time.monotonic(), [500]
        try:
            yield status
        finally:
            self._requests.labels(path, str(status[0])).inc()
            self._seconds.labels(path).observe(time.monotonic() - before)

    def watch(self, **figures: Callable[[], int]) -> None:
        """Show what these functions return, under names of `WATCHED`."""
        for name, figure in figures.items():
            self._watched[name].set_function(figure)

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


class StepTimes:
    """A predictor of steps of rows on layers of this dtype and device, in seconds of `clock`. One thread uses it.

        seconds = c0 + c1 * lines + c2 * a        a: what composer/live/kernels/_parts.py prices the lines' updates at

    The model that picks a layer's kernel knows what ranks cost: rows padded to the largest, or each its own. What it prices
    is the updates' part; what the base and this machine take is fitted to the last steps. CaraServe (Li et al. 2024, arXiv
    2401.11240) fits two such lines, one for each kind of kernel, and chooses among servers by them; here one server admits.
    """

    def __init__(self, itemsize: int, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._itemsize = itemsize
        self._device = device
        self._ranks: WeakKeyDictionary[Adapter, Ranks] = WeakKeyDictionary()
        self._steps: deque[tuple[tuple[float, float, float], float]] = deque(maxlen=NUM_STEPS)
        self._fitted: np.ndarray | None = None

    def saw(self, rows: Sequence[Row], seconds: float) -> None:
        """Remember a step of these rows."""
        self._steps.append((self._features(rows), seconds))
        self._fitted = None

    def predict(self, rows: Sequence[Row]) -> float:
        """Return the seconds of a step of these rows; 0 before any step was seen."""
        if not self._steps:
            return 0.0
        if self._fitted is None:
            self._fitted = self._fit()
        return float(np.array(self._features(rows)) @ self._fitted)

    def _fit(self) -> np.ndarray:
        """Fit c0, c1 and c2, none of them negative."""
        features_SF = np.array([features for features, _ in self._steps])
        seconds_S = np.array([seconds for _, seconds in self._steps])
        size_F = np.maximum(features_SF.max(axis=0), 1e-9)
        # in units of each feature's largest, the guess is as heavy as so many steps
        guess_F = np.array(COEFFICIENTS) * size_F
        scaled_SF = np.vstack([features_SF / size_F, GUESS * np.eye(3)])
        found_F, _ = nnls(scaled_SF, np.concatenate([seconds_S, GUESS * guess_F]))
        return np.asarray(found_F / size_F)

    def _features(self, rows: Sequence[Row]) -> tuple[float, float, float]:
        return 1.0, float(sum(len(row.prompts) for row in rows)), self._updates(rows)

    def _updates(self, rows: Sequence[Row]) -> float:
        """Return the seconds that the cost model gives the updates of one token in each line."""
        lines = [tuple(member.adapters.items()) for row in rows for member in row.served.members if member.adapters]
        ranks = {content: self._ranks_of(adapter) for line in lines for content, adapter in line}
        shapes = {shape for by_shape in ranks.values() for shape in by_shape}
        total = 0.0
        for shape in shapes:
            sums = [sum(ranks[content].get(shape, (0, 0))[1] for content, _ in line) for line in lines]
            distinct = {tuple(content for content, _ in line): rank for line, rank in zip(lines, sums, strict=True)}
            work = Workload(
                num_mixtures=len(lines),
                largest=max(sums),
                total=sum(sums),
                num_segments=len(distinct),
                distinct=sum(distinct.values()),
                stacked=sum(by_shape.get(shape, (0, 0))[1] for by_shape in ranks.values()),
                num_inputs=shape[0],
                num_outputs=shape[1],
                itemsize=self._itemsize,
                device=self._device,
            )
            total += max(by_shape.get(shape, (0, 0))[0] for by_shape in ranks.values()) * cheapest(work)
        return total

    def _ranks_of(self, adapter: Adapter) -> Ranks:
        if adapter not in self._ranks:
            ranks: dict[tuple[int, int], list[int]] = defaultdict(list)
            for factors in adapter.layers.values():
                ranks[factors.a_RI.shape[1], factors.b_OR.shape[0]].append(factors.a_RI.shape[0])
            self._ranks[adapter] = {
                shape: (len(shape_ranks), round(sum(shape_ranks) / len(shape_ranks))) for shape, shape_ranks in ranks.items()
            }
        return self._ranks[adapter]


@lru_cache(maxsize=4096)
def cheapest(work: Workload) -> float:
    """Return the seconds of the kernel that would be chosen."""
    return min(work.rates.seconds(cost) for cost in costs(work).values())
