"""Independent pieces of work on the workers that joblib names: processes of this machine, or a cluster of Ray or Dask.

Where pieces run is joblib's to say, as in scikit-learn: `n_jobs=`, or `with joblib.parallel_config(backend="dask"):`. They
are handed out by the backend's own executor and not by `joblib.Parallel`, which ends all pieces when one worker is lost
(https://joblib.readthedocs.io/en/stable/generated/joblib.parallel_config.html names the backends).
"""

from __future__ import annotations

import logging
import math
import os
import pickle
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

from loraweave.common.checks import is_whole
from loraweave.errors import WorkersFailed

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# workers that a piece may lose before it is given up: it may be what kills them
TRIES = 5
# how long a number of workers is believed
COUNTED_S = 2.0
# after so long without any worker a cluster is believed dead; one that grows on demand may take minutes for its first
GONE_S = 300.0
# pieces that lie ready for each worker of a cluster, so that none waits for the network
READY = 2


@dataclass(frozen=True)
class Failed:
    """The reason why a piece has no result: the error it raised, or WorkersFailed if its workers were lost."""

    error: Exception


class Workers(Protocol):
    """Workers that run pieces, `room` of them at a time. Raises WorkersFailed where no worker will come back."""

    @property
    def room(self) -> int: ...

    def submit(self, call: Callable[[], Any]) -> Future[Any]: ...

    def close(self) -> None: ...


def processes_here(n_jobs: int | None) -> int | None:
    """Return how many processes of this machine would work at once: 1 if only this one does, or a cluster.

    None where neither `n_jobs` nor joblib.parallel_config asks for anything. Raises WorkersFailed for a number that is none,
    and for a backend that pieces cannot be spread over.
    """
    backend, jobs = _asked(n_jobs)
    kind = _kind(backend)
    if kind in CLUSTERS:
        return 1
    if kind == "SequentialBackend":
        return None if n_jobs is None else 1
    if jobs is None or jobs > 0:
        return jobs
    # as many as have cores for their threads; -2 leaves one of them out
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
    """Yield (name, work(piece)) of every piece as it ends, or why it failed; in this process and in order unless spread.

    `work` and the pieces are pickled. A worker has as many threads of torch as this process, and runs one piece at a time,
    so that a result has the bits that it has here. A piece whose worker dies runs again on another, at most TRIES times, and
    costs the others nothing: what it writes must be the same, and whole, when it is written twice. Leaving the iteration
    ends what runs. Raises WorkersFailed as `processes_here` does, and where a cluster has had no worker for GONE_S seconds.
    """
    with crew(n_jobs) as workers:
        yield from workers.spread(work, pieces, label=label, bar=bar)


@contextmanager
def crew(n_jobs: int | None) -> Iterator[Crew]:
    """Yield the workers for rounds of pieces. Leaving the block ends what runs, and the processes of loky.

    Raises WorkersFailed as `processes_here` does.
    """
    workers = _workers(n_jobs)
    try:
        yield Crew(workers)
    finally:
        if workers is not None:
            workers.close()


class Crew:
    """Workers that keep between rounds what they have loaded; without `workers` this process does all."""

    def __init__(self, workers: Workers | None) -> None:
        self._workers = workers

    @property
    def is_here(self) -> bool:
        """True if this process does all the work."""
        return self._workers is None

    def spread(
        self, work: Callable[[Item], Result], pieces: Mapping[str, Item], *, label: str, bar: Progress
    ) -> Iterator[tuple[str, Result | Failed]]:
        """Run one round, as the function `spread` does."""
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
            # also where none waits: a cluster that is gone is found out here
            while len(running) < workers.room and waiting:
                name = waiting.popleft()
                running[workers.submit(partial(call, pieces[name]))] = name
            bar.update(shown, description=f"{label} {_listed(running.values())}")
            for future in wait(running, timeout=COUNTED_S, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                # a cluster that goes away cancels what it had
                lost = CancelledError("cancelled") if future.cancelled() else future.exception()
                tries[name] += 1
                if lost is not None and tries[name] < TRIES:
                    logger.warning("%s: the worker of %s is lost (%s); another takes it", label, name, _line(lost))
                    waiting.appendleft(name)
                    continue
                yield name, future.result() if lost is None else Failed(_given_up(name, lost))
                bar.advance(shown)


def require_all(outcomes: Mapping[str, Result | Failed]) -> dict[str, Result]:
    """Return the results, or raise the error of the first piece that failed, with a note of the others that did."""
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
    """Do a piece's work in a worker, with as many threads of torch as the caller has."""
    with _ONE_AT_A_TIME:
        # sums of another number of threads round otherwise
        torch.set_num_threads(threads)
        return _attempt(work, piece)


def _attempt(work: Callable[[Item], Result], piece: Item) -> Result | Failed:
    try:
        # a piece spreads nothing itself
        with joblib.parallel_config(backend="sequential"):
            return work(piece)
    except Exception as error:
        try:
            # an error whose parts cannot travel would look like a lost worker
            pickle.loads(pickle.dumps(error))
        except Exception:
            return Failed(RuntimeError(f"{type(error).__name__}: {error}"))
        return Failed(error)


def _asked(n_jobs: int | None) -> tuple[Any, int | None]:
    """Return joblib's backend, and the number of workers that the call or joblib's configuration names."""
    backend, said = get_active_backend()
    if n_jobs is not None and not (is_whole(n_jobs, -sys.maxsize) and n_jobs):
        raise WorkersFailed(f"n_jobs is {n_jobs!r:.40}: give a number of workers, -1 for all there are, or None")
    return backend, said if n_jobs is None else n_jobs


CLUSTERS = ("DaskDistributedBackend", "RayBackend")
HERE = ("LokyBackend", "SequentialBackend")


def _kind(backend: Any) -> str:
    """Return the name of the backend's class, or of the known one that it extends: Ray's and Dask's may not be installed."""
    names = [kind.__name__ for kind in type(backend).__mro__]
    for name in names:
        if name in (*CLUSTERS, *HERE):
            return name
    raise WorkersFailed(
        f"pieces cannot be spread over joblib's {names[0]}: threads would share one model, and other pools do not outlive a "
        'lost process; name "loky", "dask" or "ray"'
    )


def _workers(n_jobs: int | None) -> Workers | None:
    """Make the workers; None if this process does all the work."""
    backend, jobs = _asked(n_jobs)
    most = jobs if jobs is not None and jobs > 0 else None
    match _kind(backend):
        case "DaskDistributedBackend":
            return _Dask(backend, most)
        case "RayBackend":
            return _Ray(backend, most)
        case "LokyBackend" if (number := processes_here(n_jobs) or 1) > 1:
            return _Processes(number)
    return None


class _Processes:
    """Processes of this machine, each with an executor of its own, since one that lost a process ends all of its others."""

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
    """End this process soon after the one that started it: a driver that is killed cannot see to that itself."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(COUNTED_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Counted:
    """A cluster, whose workers are counted every COUNTED_S seconds, since they come and go."""

    def __init__(self, count: Callable[[], int], most: int | None) -> None:
        self._count, self._most = count, most
        # since when no worker was counted: infinity while there is one
        self._known, self._counted, self._empty = 0, -math.inf, math.inf

    @property
    def room(self) -> int:
        now = time.monotonic()
        if now - self._counted > COUNTED_S:
            self._known, self._counted = self._count(), now
            self._empty = math.inf if self._known else min(self._empty, now)
        if now - self._empty > GONE_S:
            raise WorkersFailed(
                f"the cluster has had no worker for {GONE_S:.0f} s: look whether its head and its workers run, connect "
                "to it again, and make the same call; n_jobs=1 runs the pieces in this process"
            )
        return READY * max(1, self._known) if self._most is None else self._most


class _Dask(_Counted):
    """The workers of a Dask client; the scheduler itself moves what a lost worker had."""

    def __init__(self, backend: Any, most: int | None) -> None:
        super().__init__(lambda: sum(backend.client.ncores().values()), most)
        self._executor = backend.client.get_executor(pure=False, **backend.submit_kwargs)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = self._executor.submit(call)
        return future

    def close(self) -> None:
        self._executor.shutdown(wait=False)


class _Ray(_Counted):
    """Tasks of a Ray cluster; a lost one is a matter of `spread`, so that it is named and counted."""

    def __init__(self, backend: Any, most: int | None) -> None:
        ray = _ray()
        # as many cores as torch has threads, unless the backend's arguments say otherwise
        own = {key: value for key, value in (backend.ray_remote_args or {}).items() if not key.startswith("max_")}
        options = {"num_cpus": torch.get_num_threads(), **own}
        super().__init__(lambda: int(ray.cluster_resources().get("CPU", 0) // (options["num_cpus"] or 1)), most)
        self._run = ray.remote(_called).options(max_retries=0, **options)
        self._cancel = partial(ray.cancel, force=True)
        self._references: dict[Future[Any], Any] = {}

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        self._references = {future: pending for future, pending in self._references.items() if not future.done()}
        reference = self._run.remote(call)
        future: Future[Any] = reference.future()
        self._references[future] = reference
        return future

    def close(self) -> None:
        for future, reference in self._references.items():
            if not future.done():
                self._cancel(reference)


def _called(call: Callable[[], Any]) -> Any:
    return call()


def _ray() -> Any:
    """Return Ray, connected to `ray.init`'s cluster or RAY_ADDRESS. None is started: it would listen on every address."""
    import ray

    if not ray.is_initialized():
        if "RAY_ADDRESS" not in os.environ:
            raise WorkersFailed('Ray is not connected: call ray.init(address="...") first, or set RAY_ADDRESS')
        ray.init()
    return ray
