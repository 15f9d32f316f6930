"""Independent pieces of work, run by joblib's workers: processes of this machine, or an entry of the registry `workers`.

As in scikit-learn, `n_jobs=` or `with joblib.parallel_config(backend="dask"):` says where pieces run. They are submitted to
the backend's own executor, not to `joblib.Parallel`, which ends all pieces when one worker is lost
(https://joblib.readthedocs.io/en/stable/generated/joblib.parallel_config.html names the backends).
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import joblib
import torch
from joblib.externals.loky import ProcessPoolExecutor
from joblib.parallel import get_active_backend
from rich.progress import Progress

import loraweave.registry as registry
from loraweave.common.checks import is_whole
from loraweave.errors import PackageMissing, WorkersFailed

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# how many workers may be lost with a piece before it is given up, since the piece may be the cause
TRIES = 5
# seconds from one look at the running pieces, or at whether the parent process still lives, to the next
LOOK_S = 2.0


@dataclass(frozen=True)
class Failed:
    """The reason why a piece has no result: the error it raised, or WorkersFailed if its workers were lost."""

    error: Exception


class Workers(Protocol):
    """Workers that run up to `room` pieces at a time. Raises WorkersFailed if no worker is left or can return."""

    @property
    def room(self) -> int: ...

    def submit(self, call: Callable[[], Any]) -> Future[Any]: ...

    def close(self) -> None: ...


def processes_here(n_jobs: int | None) -> int | None:
    """Return how many processes of this machine would work at once: 1 if only this one would, or a cluster.

    Returns None if neither `n_jobs` nor joblib.parallel_config is set. Raises WorkersFailed for an invalid `n_jobs`, and for
    a backend that cannot run pieces.
    """
    _, kind, jobs = _asked(n_jobs)
    if kind not in HERE:
        return 1
    if kind == "sequential":
        return None if n_jobs is None else 1
    if jobs is None or jobs > 0:
        return jobs
    # -1 is as many processes as have cores for their threads, -2 one fewer
    every: int = joblib.cpu_count() // torch.get_num_threads()
    return max(1, every + 1 + jobs)


def spread(
    work: Callable[[Item], Result],
    pieces: Mapping[str, Item],
    *,
    n_jobs: int | None,
    label: str,
    bar: Progress,
) -> Iterator[tuple[str, Result | Failed]]:
    """Yield (name, work(piece) or Failed) for every piece as it ends; without workers, in this process and in order.

    `work` and the pieces are pickled. A worker has as many torch threads as this process and runs one piece at a time, so
    that a result has the same bits as here. A piece whose worker dies runs again on another, at most TRIES times, without
    loss to other pieces: files that a piece writes must be the same, and whole, when it runs twice. Leaving the iteration
    ends the pieces that run. Raises WorkersFailed for an unusable `n_jobs` or backend, or a cluster without workers left.
    """
    with crew(n_jobs) as workers:
        yield from workers.spread(work, pieces, label=label, bar=bar)


def spreader(part: str, n_jobs: int | None) -> Any:
    """Return the extension's module that spreads `part`, the name of some work, or None if this process does it all.

    Raises WorkersFailed for an unusable `n_jobs` or backend, PackageMissing for workers without an extension for `part`.
    """
    if processes_here(n_jobs) is None:
        return None
    module = next(registry.bringing(part), None)
    if module is None and n_jobs != 1:
        raise PackageMissing(
            f"{part} by workers, which n_jobs or joblib.parallel_config asks for, is done by none of the extensions at "
            "hand: pass n_jobs=1, which does it in this process"
        )
    return module


@contextmanager
def crew(n_jobs: int | None) -> Iterator[Crew]:
    """Yield workers for several rounds of pieces. Leaving the block ends running pieces and worker processes.

    Raises WorkersFailed for an invalid `n_jobs`, and for a backend that cannot run pieces.
    """
    backend, kind, jobs = _asked(n_jobs)
    workers: Workers | None = None
    if kind not in HERE:
        workers = registry.get("workers", kind)(backend, jobs if jobs is not None and jobs > 0 else None)
    elif (number := processes_here(n_jobs) or 1) > 1:
        workers = _Processes(number)
    try:
        yield Crew(workers)
    finally:
        if workers is not None:
            workers.close()


class Crew:
    """Workers that keep loaded models between rounds of pieces; if `workers` is None, this process does all the work."""

    def __init__(self, workers: Workers | None) -> None:
        self._workers = workers

    @property
    def is_here(self) -> bool:
        """True if this process does all the work."""
        return self._workers is None

    def spread(
        self, work: Callable[[Item], Result], pieces: Mapping[str, Item], *, label: str, bar: Progress
    ) -> Iterator[tuple[str, Result | Failed]]:
        """Yield (name, work(piece) or Failed) for every piece of one round, as the function `spread` does."""
        workers = self._workers
        shown = bar.add_task(label, total=len(pieces), loss="", left="")
        if workers is None:
            for name, piece in pieces.items():
                bar.update(shown, description=f"{label} {name}")
                yield name, _attempt(work, piece)
                bar.advance(shown)
            return
        waiting, tries = deque(pieces), Counter[str]()
        running: dict[Future[Any], str] = {}
        call = partial(_carry_out, work, torch.get_num_threads())
        while waiting or running:
            # `room` is read even if no piece waits: it raises if the cluster is gone
            while len(running) < workers.room and waiting:
                name = waiting.popleft()
                running[workers.submit(partial(call, pieces[name]))] = name
            bar.update(shown, description=f"{label} {_listed(running.values())}")
            for future in wait(running, timeout=LOOK_S, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                # a cluster that goes away cancels its futures
                lost = CancelledError("cancelled") if future.cancelled() else future.exception()
                tries[name] += 1
                if lost is not None and tries[name] < TRIES:
                    logger.warning("%s: the worker of %s is lost (%s); another takes it", label, name, _line(lost))
                    waiting.appendleft(name)
                    continue
                yield name, future.result() if lost is None else Failed(_given_up(name, lost))
                bar.advance(shown)


def require_all(outcomes: Mapping[str, Result | Failed]) -> dict[str, Result]:
    """Return the results by name, or raise the error of the first piece that failed, with notes about the other failures."""
    failed = {name: outcome.error for name, outcome in outcomes.items() if isinstance(outcome, Failed)}
    for name, error in failed.items():
        error.add_note(f"this was piece {name!r} of {len(outcomes)}; the same call runs what failed again")
        for other, why in failed.items():
            if other != name:
                error.add_note(f"{other!r} failed, too: {type(why).__name__}: {why}")
        raise error
    return {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, Failed)}


def _listed(names: Any) -> str:
    first, *others = [*names] or [""]
    return f"{first} and {len(others)} more" if others else first


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _given_up(name: str, lost: BaseException) -> WorkersFailed:
    return WorkersFailed(
        f"piece {name!r} was given up after {TRIES} workers were lost with it ({_line(lost)}): look for too little memory, "
        "or a library that crashes; n_jobs=1 runs it in this process"
    )


# threads of one worker share its model
_ONE_AT_A_TIME = threading.Lock()


def _carry_out(work: Callable[[Item], Result], threads: int, piece: Item) -> Result | Failed:
    """Set torch's number of threads to the caller's `threads` in a worker, and return work(piece), or Failed."""
    with _ONE_AT_A_TIME:
        # a sum rounds differently with another number of threads
        torch.set_num_threads(threads)
        return _attempt(work, piece)


def _attempt(work: Callable[[Item], Result], piece: Item) -> Result | Failed:
    try:
        # work inside a piece is not spread again
        with joblib.parallel_config(backend="sequential"):
            return work(piece)
    except Exception as error:
        try:
            # an error that cannot be pickled would look like a lost worker
            pickle.loads(pickle.dumps(error))
        except Exception:
            return Failed(RuntimeError(f"{type(error).__name__}: {error}"))
        return Failed(error)


HERE = ("loky", "sequential")


def _asked(n_jobs: int | None) -> tuple[Any, str, int | None]:
    """Return (backend, kind, number of workers): joblib's active backend, and `n_jobs` or else joblib's own (None: unset).

    The kind is the first word in the class name of the backend or of a base class: one of `HERE`, or an entry of `workers`.
    """
    backend, said = get_active_backend()
    if n_jobs is not None and not (is_whole(n_jobs, -sys.maxsize) and n_jobs):
        raise WorkersFailed(f"n_jobs is {n_jobs!r:.40}: give a number of workers, -1 for all there are, or None")
    jobs = said if n_jobs is None else n_jobs
    names = [kind.__name__ for kind in type(backend).__mro__]
    words = [re.sub(r"(?<=[a-z])[A-Z].*", "", name).lower() for name in names]
    if words[0] in HERE:
        return backend, words[0], jobs
    known = [*HERE, *registry.names("workers")]
    for word in words:
        if word in known:
            return backend, word, jobs
    raise WorkersFailed(
        f"pieces cannot be spread over joblib's {names[0]}: threads would share one model, and other pools do not outlive a "
        f"lost process; name one of {', '.join(known)}"
    )


class _Processes:
    """Processes of this machine, each in an executor of its own: an executor that loses one process ends all its others."""

    def __init__(self, number: int) -> None:
        self.room = number
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Any], ProcessPoolExecutor] = {}

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        for future, executor in [pair for pair in self._busy.items() if pair[0].done()]:
            del self._busy[future]
            if future.exception() is None:
                self._idle.append(executor)
            else:
                executor.shutdown(wait=True, kill_workers=True)
        while self._idle:
            executor = self._idle.pop()
            try:
                return self._begin(executor, call)
            # its process was lost between two pieces
            except BrokenExecutor:
                executor.shutdown(wait=True, kill_workers=True)
        return self._begin(ProcessPoolExecutor(max_workers=1, initializer=_end_with, initargs=(os.getpid(),)), call)

    def _begin(self, executor: ProcessPoolExecutor, call: Callable[[], Any]) -> Future[Any]:
        begun: Future[Any] = executor.submit(call)
        self._busy[begun] = executor
        return begun

    def close(self) -> None:
        for executor in (*self._idle, *self._busy.values()):
            executor.shutdown(wait=True, kill_workers=True)


def _end_with(driver: int) -> None:
    """End this process soon after its parent, whose process id is `driver`: a parent that is killed cannot end it."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
