"""State of the process: garbage collection, locks across forks, context variables, free memory and threads.

Many small pieces of linear algebra go side by side, since threads across pieces are faster than threads inside each.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import scipy.linalg  # noqa: F401  its BLAS must be loaded to be found
import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pauses the cyclic collector of the process for the length of a `with` block; one that was off stays off.

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
    """A reentrant lock to keep as `owner._lock`; a forked process replaces it with a free one.

    The lock has no wrapper class: `with` acquires the interpreter's own in a way that no interruption can leave it taken.
    """
    _OWNERS.add(owner)
    return threading.RLock()


def _renew() -> None:
    for owner in list(_OWNERS):
        owner._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


T = TypeVar("T")


@contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Sets the variable inside the block, in this thread or asyncio task, and restores it afterwards."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes() -> int | None:
    """The memory a process may still take, within a container's limit. None if the system does not tell."""
    if not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    return min([free, *_cgroup_bytes()])


def _cgroup_bytes() -> list[int]:
    """What a container's limit leaves, including reclaimable cached files; empty without a limit."""
    limit, used, statistics = (CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.is_file() or (text := limit.read_text().strip()) == "max":
        return []
    cached = dict(line.split() for line in statistics.read_text().splitlines())
    return [max(0, int(text) - int(used.read_text()) + int(cached.get("inactive_file", 0)))]


Item = TypeVar("Item")
Result = TypeVar("Result")


class _BlasThreads:
    """The number of BLAS threads of the process, which is one while anyone is inside."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.libraries: ThreadpoolController | None = None
        self.limit: Any = None

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                if self.libraries is None:
                    self.libraries = ThreadpoolController().select(user_api="blas")
                self.limit = self.libraries.limit(limits=1)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.limit.restore_original_limits()


_blas = _BlasThreads()


@contextmanager
def one_blas_thread(wanted: bool = True) -> Iterator[None]:
    """Limits BLAS and LAPACK of numpy and scipy to one thread in the whole process, until the last such block ends.

    On matrices of a few hundred rows their threads wait longer than they work. Does nothing unless `wanted`.
    """
    if not wanted:
        yield
        return
    _blas.enter()
    try:
        yield
    finally:
        _blas.leave()


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], *, worth: Callable[[Item], bool] = lambda item: True
) -> Iterator[Result]:
    """`function` of each item, in order, on as many threads as torch uses, while further items are produced.

    At most two more items than threads exist at a time. Items not `worth` a thread run in the caller's. BLAS has one thread
    meanwhile. An error is raised in place of its result, after running calls have finished.
    """
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
