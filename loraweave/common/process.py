"""State of the process: garbage collection, locks across forks, threads, context variables, its launch and free memory."""

import ctypes
import gc
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause Python's cyclic garbage collector inside the block; a collector that was off stays off.

    Opening an adapter makes some thousand objects, and with hundreds of adapters open the collector takes half the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_OWNERS: WeakSet[Any] = WeakSet()


def lock_of(owner: Any) -> Any:
    """Make a reentrant lock to keep as `owner._lock`; a forked process replaces it with a free one.

    The lock has no wrapper class: the interpreter's own `with` leaves no lock taken when it is interrupted.
    """
    _OWNERS.add(owner)
    return threading.RLock()


def _renew() -> None:
    for owner in list(_OWNERS):
        owner._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")

_blas_lock = threading.Lock()
# one entry for each open block of `one_blas_thread`: the limit that the first block set, None for every other block
_blas_limits: list[Any] = []


@cache
def _blas(has_scipy: bool) -> Any:
    # scipy brings a BLAS of its own
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread(wanted: bool = True) -> Iterator[int]:
    """Limit numpy's and scipy's BLAS and LAPACK to one thread in the whole process, until the last open block ends.

    The block gets the number of threads that it took from BLAS. On matrices of a few hundred rows, several threads wait
    longer than they compute, most of all while other programs compute. Does nothing unless `wanted`.
    """
    if not wanted:
        yield 1
        return
    with _blas_lock:
        limit = None if _blas_limits else _blas("scipy.linalg" in sys.modules).limit(limits=1)
        _blas_limits.append(limit)
    try:
        yield 1 if limit is None else limit.get_original_num_threads()["blas"] or 1
    finally:
        with _blas_lock:
            # the first block set the limit, and the last open block restores it
            limit = _blas_limits[0]
            _blas_limits.pop()
            if not _blas_limits:
                limit.restore_original_limits()


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], *, worth: Callable[[Item], bool] = lambda item: True
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, computed on as many threads as torch uses.

    Items are drawn while threads compute, at most two more than there are threads. If `worth(item)` is False, the caller's
    thread computes. BLAS has one thread meanwhile. An error is raised in place of its result, after running calls ended.
    """
    import torch

    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        for item in items:
            if threads > 1 and worth(item):
                waiting.append(pool.submit(function, item))
            else:
                while waiting:
                    yield waiting.popleft().result()
                yield function(item)
            while waiting and (len(waiting) > threads or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Set the variable inside the block, in this thread or asyncio task, and restore it afterwards."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def launched_processes() -> int:
    """Return how many processes were launched together, by torch.distributed or torchrun; 1 without a launch."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def give_back_freed_memory() -> None:
    """Return freed memory to the operating system, where the C library is glibc, which otherwise keeps much of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes() -> int | None:
    """Return how many bytes of memory this process may still take, within a container's limit; None if unknown."""
    if not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    limit, used, statistics = (CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.is_file() or (text := limit.read_text().strip()) == "max":
        return free
    # cached files that can be reclaimed are free, too
    cached = dict(line.split() for line in statistics.read_text().splitlines())
    return min(free, max(0, int(text) - int(used.read_text()) + int(cached.get("inactive_file", 0))))
