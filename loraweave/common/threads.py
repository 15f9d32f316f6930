"""Many small pieces of linear algebra at once: threads across pieces are faster than threads inside each."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import scipy.linalg  # noqa: F401  its BLAS must be loaded to be found
import torch
from threadpoolctl import ThreadpoolController

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
    """Limit BLAS and LAPACK of numpy and scipy to one thread in the whole process, until the last such block ends.

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
    """Yield `function` of each item, in order, on as many threads as torch uses, while further items are produced.

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
