"""Two ways to make small pieces of arithmetic fast: threads that each take a whole piece, and libraries of C files.

A library is compiled for this processor at first use, kept in the cache folder and loaded once a process. Any C compiler
does (`CC`, else cc, gcc or clang), in about a second; without one, or with LORAWEAVE_NATIVE=0, callers compute the same in
PyTorch. LORAWEAVE_NATIVE may name an older processor as the compiler's -march does: x86-64 has what every such processor
has.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import scipy.linalg  # noqa: F401  its BLAS must be loaded to be found
import torch
from threadpoolctl import ThreadpoolController

from loraweave.common.files import cache_folder, whole_file

Item = TypeVar("Item")
Result = TypeVar("Result")

# no -ffast-math: a library linked with it changes how the whole thread rounds
FLAGS = ("-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
_SECONDS = 60

_logger = logging.getLogger(__name__)

# whether something takes notes of torch's operations, which a call of a library is not: tracing, a count of operations
is_watched = torch._C._len_torch_dispatch_stack

_blas_lock = threading.Lock()
# the blocks of `one_blas_thread` that are open, and the limit that the first of them set
_blas_limits: list[Any] = []


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread(wanted: bool = True) -> Iterator[None]:
    """Limit BLAS and LAPACK of numpy and scipy to one thread in the whole process, until the last such block ends.

    On matrices of a few hundred rows their threads wait longer than they work. Does nothing unless `wanted`.
    """
    if not wanted:
        yield
        return
    with _blas_lock:
        _blas_limits.append(None if _blas_limits else _blas().limit(limits=1))
    try:
        yield
    finally:
        with _blas_lock:
            # whichever block ends last, the limit is that of the first
            limit = _blas_limits[0]
            _blas_limits.pop()
            if not _blas_limits:
                limit.restore_original_limits()


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


@cache
def library(source: Path, *, brief: bool) -> ctypes.CDLL | None:
    """Compile and load a C file as a library; return None where that fails, which is logged, or if LORAWEAVE_NATIVE is 0.

    Pass `brief` if its calls take microseconds: they then hold Python's lock, which costs less than releasing it.
    """
    if os.environ.get("LORAWEAVE_NATIVE") == "0":
        return None
    try:
        return (ctypes.PyDLL if brief else ctypes.CDLL)(str(_compiled(source)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _logger.info("PyTorch does the work of the library of %s: %s", source.name, str(said).strip()[:500])
        return None


def _compiled(source: Path) -> Path:
    """Return the library's file, compiled if it is missing. Raises OSError or SubprocessError if that fails."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc, clang, or $CC)")
    named = os.environ.get("LORAWEAVE_NATIVE", "")
    flags = *FLAGS, f"-march={'native' if named in ('', '1') else named}"
    # for this very processor: a folder may be shared by several machines
    parts = source.read_bytes(), " ".join(flags).encode(), compiler.encode(), _processor().encode()
    target = cache_folder() / "native" / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.so"
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = target.parent.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise OSError(f"others may write to {target.parent}, so that nothing is loaded from it: chmod 700, and own it")
    if not target.exists():
        _logger.info("compiling %s with %s, once for this machine; it is kept as %s", source.name, compiler, target)
        with whole_file(target) as temporary:
            command = [compiler, *flags, "-o", str(temporary), str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    return target


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return "".join(sorted(set(re.findall(r"^(?:model name|flags|Features).*", text, re.MULTILINE))))
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
