"""The one thread that owns the model: rows wait, join the running batch at a step, and leave it when they are over.

    submit(rows) -> waiting -> [prompt read] -> running -> over
                       |                           |
                       '------- the client has gone, or its time is up

A row joins as soon as there is room for it, in the order of arrival: the number of lines (prompts of members) is limited,
and so is that number times the longest line. With a time limit for a token, a row also waits while the step with it is
predicted to take longer, and rows whose ranks cost less pass it, a few times at most. All rows of weighted sums and
averages are one batch; those under one router are another, and each batch does a step in turn. If the model fails on
several rows together, each is read again alone, so that only the row at fault ends.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from loraweave.composer.live.kernels._parts import only_kernel
from loraweave.errors import CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.serving.batch import Batch, Prefixes, Row
from loraweave.serving.limits import Limits, Refusal, logger
from loraweave.serving.memory import Experts
from loraweave.serving.names import Served

# rows that may begin before one that came earlier; then all wait for that one
MOST_PASSED = 8
# seconds between two looks at waiting rows while none can run
WAIT = 0.02


class Metrics:
    """The figures of one server, which calls a method for each event. This class counts nothing; an extension's does."""

    content_type = "text/plain"

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request with its HTTP status and its seconds, for a stream up to the first token."""

    def watch(self, **figures: Callable[[], int]) -> None:
        """Show the values that these functions return, such as running_rows, waiting_rows, open_requests or prefix_bytes."""

    def read(self, num_tokens: int, num_kept: int, num_rows: int) -> None:
        """Count the prompts' tokens that were read, those whose keys and values were kept, and a new token for each row."""

    def stepped(self, num_rows: int) -> None:
        """Count a step of the running batch, and a new token for each row."""

    def ended(self, row: Row) -> None:
        """Count a row that has ended, and record its times: of its making, leaving the queue, first and last token."""

    def text(self) -> bytes:
        """Return all figures as text."""
        raise Refusal(404, "this server shows no figures: the extension that counts them is not installed")


class Admission:
    """A policy for which rows run together, within the limits of rows and tokens. This base class lets all run."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    # whether later rows may run before a row that has to wait
    lets_pass = False
    # the bytes of compositions that threads are making, which the scheduler counts
    reserved = 0

    def figures(self, running: Callable[[], Sequence[Row]]) -> Mapping[str, Callable[[], int]]:
        """Return figures of its own for `Metrics.watch`; `running` returns the rows that run."""
        return {}

    def require_possible(self, row: Row) -> None:
        """Raise Refusal for a row that could not even run alone."""

    def require_loadable(self, num_bytes: int, num_tokens: int) -> None:
        """Raise Refusal if memory could not hold a composition of `num_bytes` and an answer of `num_tokens` even alone."""

    def has_room(self, rows: Sequence[Row], num_bytes: int = 0) -> bool:
        """Return True if the rows, adapters in use, and `num_bytes` more fit into memory without what is kept unused."""
        return True

    def make_room(self, rows: Sequence[Row]) -> None:
        """Drop kept prefixes and unused adapters until the remaining ones fit into memory beside these rows."""

    def is_quick(self, rows: Sequence[Row]) -> bool:
        """Return True if a step that gives each of these rows a token is predicted to be within the time limit."""
        return True

    def saw(self, rows: Sequence[Row], seconds: float) -> None:
        """Record the seconds, by `clock`, that a step of these rows took."""


@dataclass(eq=False)
class Claim:
    """A thread's claim to memory for a composition that it is about to make."""

    num_bytes: int
    is_granted: bool = False


class Scheduler:
    """A thread that runs rows until `close`. Other threads may call every public method but `turn`.

    Raises CompositionError for a model whose rows cannot share a cache.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        limits: Limits,
        metrics: Metrics,
        make_admission: Callable[[Any, Limits, Prefixes, Experts], Admission] | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self.experts = Experts(model, tokenizer, limits.loaded)
        self._prefixes = prefixes or Prefixes()
        self._admission = Admission()
        if make_admission is not None:
            self._admission = make_admission(model, limits, self._prefixes, self.experts)
        elif 0 < limits.memory_bytes < float("inf") or limits.token_seconds < float("inf"):
            raise CompositionError("memory_bytes and token_seconds are kept by an extension, which is not installed")
        self._make_batch = partial(Batch, model, tokenizer, self.experts, self._prefixes)
        # the batch of rows without a router is always there
        self._batches: dict[Hashable, Batch] = {None: self._make_batch()}
        self._waiting: deque[Row] = deque()
        self._claims: deque[Claim] = deque()
        # whether something but rows has changed
        self._woken = False
        self._changed = threading.Condition()
        self._closed = False
        self._shapes = partial(only_kernel, "fixed_shape", model) if limits.batch_invariant else nullcontext
        with self._shapes():
            # a model whose products cannot be fixed is refused here
            pass
        metrics.watch(
            running_rows=lambda: len(self._running),
            waiting_rows=lambda: len(self._waiting),
            prefix_bytes=lambda: self._prefixes.kept_bytes,
            **self._admission.figures(lambda: self._running),
        )
        self._thread = threading.Thread(target=self._run, name="loraweave-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End every row with an error, and then the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """True if submitted rows will run."""
        return self._thread.is_alive() and not self._closed

    def release(self, served: Served) -> None:
        """End one reservation of a composition: of `prepare`, or of `hold` or `pin` of `experts`."""
        self.experts.release(served)
        self.wake()

    @contextmanager
    def room(
        self, adapters: Collection[Adapter], num_values: int, num_tokens: int, deadline: float, is_wanted: Callable[[], bool]
    ) -> Iterator[None]:
        """Wait for memory for a composition of these adapters and `num_values` merged values, which the block makes.

        Raises Refusal: 413 if there can never be room for the composition and an answer of `num_tokens`, 504 at the deadline
        or once `is_wanted` returns False, 503 after `close`.
        """
        claim = Claim(self.experts.missing_bytes(adapters, num_values))
        self._admission.require_loadable(claim.num_bytes, num_tokens)
        with self._changed:
            # granted between two steps, when it is known what the rows need
            self._claims.append(claim)
            self.wake()
            self._changed.wait_for(
                lambda: claim.is_granted or self._closed or not is_wanted(), max(0.0, deadline - time.monotonic())
            )
        try:
            if self._closed:
                raise Refusal(503, "the server is stopping", code="unavailable")
            if not claim.is_granted:
                raise Refusal(504, "the deadline passed before there was memory for it", code="deadline_exceeded")
            yield
        finally:
            with self._changed:
                if claim in self._claims:
                    self._claims.remove(claim)
                else:
                    self._admission.reserved -= claim.num_bytes
                self.wake()

    def prepare(self, served: Served) -> None:
        """Load a composition's adapters into the engine while others run; they stay loaded until `release`.

        Raises what `Experts.load` raises, and Refusal with status 400 if answers must be batch-invariant, but weights differ
        between the tokens of a row.
        """
        if self._limits.batch_invariant and (why := served.apart):
            raise Refusal(
                400,
                f"{served.canonical} is refused: {why}, and this server's answers have the same bits in any batch, so that "
                "all tokens of a row must share their weights; ask for a sum, a merge or an average of other adapters, or "
                "start the server without --batch-invariant",
                param="model",
            )
        self.experts.take(served)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue all rows, or none. Raises Refusal: 429 if too many wait, 413 for a row with too many tokens or prompts."""
        for row in rows:
            if len(row.prompts) * row.longest > self._limits.cache_tokens:
                raise Refusal(
                    413,
                    f"the prompt and its answer have up to {len(row.prompts) * row.longest} tokens, and this server keeps "
                    f"{self._limits.cache_tokens}; ask for fewer max_tokens, or shorten the prompt",
                    code="context_length_exceeded",
                )
            if len(row.prompts) > self._limits.rows:
                raise Refusal(413, f"this average asks {len(row.prompts)} prompts at once, above --rows {self._limits.rows}")
            self._admission.require_possible(row)
        with self._changed:
            if not self.alive:
                raise Refusal(503, "the server is stopping", code="unavailable")
            if len(self._waiting) + len(rows) > self._limits.waiting:
                raise too_busy(f"{len(self._waiting)} answers wait already, of {self._limits.waiting} that may")
            for row in rows:
                self.experts.pin(row.served)
                row.held = True
            self._waiting.extend(rows)
            self.wake()

    def wake(self) -> None:
        """Wake the thread, because a client has gone, or memory is wanted or free."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def _run(self) -> None:
        ended: Exception | None = None
        try:
            with self._shapes():
                while self.turn():
                    pass
        except Exception as error:
            logger.critical("the scheduler ended", exc_info=error)
            ended = error
        with self._changed:
            self._closed = True
            left, self._waiting = [*self._running, *self._waiting], deque()
            self._changed.notify_all()
        for row in left:
            row.fail(ended or Refusal(503, "the server is stopping", code="unavailable"))

    @property
    def _running(self) -> list[Row]:
        return [row for batch in self._batches.values() for row in batch.rows]

    def turn(self) -> bool:
        """Wait until there are rows; admit waiting ones and run a step of each batch. Return False once closed."""
        with self._changed:
            while not (self._closed or self._woken or self._waiting or self._running):
                self._changed.wait()
            self._woken = False
            if self._closed:
                return False
        self._dismiss_unwanted()
        self.experts.trim()
        self._grant()
        self._admit()
        for batch in list(self._batches.values()):
            if batch.rows:
                self._step(batch)
        self._batches = {key: batch for key, batch in self._batches.items() if key is None or batch.rows}
        with self._changed:
            if self._waiting and not (self._running or self._woken):
                # for a composition that is being made
                self._changed.wait(WAIT)
        return True

    def _grant(self) -> None:
        """Make room for compositions that threads wait to make, in their order, beside the waiting row that needs most."""
        while self._claims:
            with self._changed:
                largest = max(self._waiting, key=lambda row: len(row.prompts) * row.longest, default=None)
                batches = [self._running, *([] if largest is None else [[largest]])]
                if not self._claims or not all(
                    self._admission.has_room(rows, self._claims[0].num_bytes) for rows in batches
                ):
                    return
                claim = self._claims.popleft()
                self._admission.reserved += claim.num_bytes
            self._admission.make_room(self._running)
            with self._changed:
                claim.is_granted = True
                self._changed.notify_all()

    def _dismiss_unwanted(self) -> None:
        with self._changed:
            for row in list(self._waiting):
                row.require_wanted()
                if row.over:
                    self._waiting.remove(row)
                    self._let_go(row)
        for batch in self._batches.values():
            running = batch.rows
            for row in running:
                row.require_wanted()
            batch.drop_ended()
            self._release(running)

    def _admit(self) -> None:
        """Load the adapters and read the prompts of waiting rows, as far as there is room."""
        joining: list[Row] = []
        while (row := self._next([*self._running, *joining])) is not None:
            self._admission.make_room([*self._running, *joining, row])
            try:
                self.experts.take(row.served)
            except Exception as error:
                row.fail(error)
                self._let_go(row)
            else:
                self._let_go(row)
                row.held = True
                joining.append(row)
        first: dict[Hashable, list[Row]] = {}
        again: dict[Hashable, list[Row]] = {}
        for row in joining:
            # further answers to a prompt use the keys and values of the first, once those are kept
            asked_before = any(row.asks_like(other) for other in first.get(row.batch, ()))
            (again if asked_before else first).setdefault(row.batch, []).append(row)
        for rows in (*first.values(), *again.values()):
            self._read(rows)

    def _next(self, others: Sequence[Row]) -> Row | None:
        """Take the first waiting row with room and time for it; None if there is none, or an earlier one must come first."""
        with self._changed:
            for place, row in enumerate(self._waiting):
                if self._has_room([*others, row]) and (not others or self._admission.is_quick([*others, row])):
                    for earlier in islice(self._waiting, place):
                        earlier.passed += 1
                    del self._waiting[place]
                    row.begun = time.monotonic()
                    return row
                if not (others or self._admission.reserved):
                    row.fail(too_busy("adapters of other requests take its memory"))
                if row.passed >= MOST_PASSED or not self._admission.lets_pass:
                    return None
            return None

    def _has_room(self, rows: Sequence[Row]) -> bool:
        num_lines = sum(len(row.prompts) for row in rows)
        fits = num_lines <= self._limits.rows and num_lines * max(row.longest for row in rows) <= self._limits.cache_tokens
        return fits and self._admission.has_room(rows)

    def _read(self, rows: Sequence[Row]) -> None:
        num_tokens = sum(map(len, (ids for row in rows for ids in row.ids)))
        key = rows[0].batch
        if key not in self._batches:
            self._batches = {**self._batches, key: self._make_batch()}
        batch = self._batches[key]
        try:
            batch.read(rows)
        except Exception as error:
            self._apart(rows, error)
        else:
            num_kept = sum(row.num_kept for row in rows)
            self._metrics.read(num_tokens - num_kept, num_kept, len(rows))
        self._release(rows)
        self._admission.make_room(self._running)

    def _step(self, batch: Batch) -> None:
        rows = batch.rows
        begun = self._admission.clock()
        try:
            batch.step()
        except Exception as error:
            # what the cache holds is not known
            batch.clear()
            self._apart(rows, error)
        else:
            self._admission.saw(rows, self._admission.clock() - begun)
            self._metrics.stepped(len(rows))
        self._release(rows)
        self._admission.make_room(self._running)

    def _apart(self, rows: Sequence[Row], error: Exception) -> None:
        """After the model failed on `rows`, read each row again, alone; end a row that failed alone, or a second time."""
        if len(rows) > 1:
            logger.warning("the model failed on %d rows together; each is read again alone", len(rows), exc_info=error)
        for row in rows:
            if len(rows) == 1 or row.suspect:
                row.fail(error)
                self._release([row])
            else:
                row.suspect = True
                self._read([row])

    def _release(self, rows: Sequence[Row]) -> None:
        """Release, once, the adapters of rows that have ended."""
        for row in rows:
            if row.over and self._let_go(row):
                self._metrics.ended(row)

    def _let_go(self, row: Row) -> bool:
        """Release a row's adapters; return False if they were released before."""
        if row.held:
            row.held, self._woken = False, True
            self.experts.give_back(row.served)
            return True
        return False


def too_busy(why: str) -> Refusal:
    """Return a Refusal with status 429, which asks the client to try again after a second."""
    return Refusal(429, f"the server is busy: {why}; try again later", code="busy", headers={"Retry-After": "1"})
