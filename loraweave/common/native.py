"""Libraries of C files: compiled for this processor at first use, kept in the cache folder, loaded once a process.

Any C compiler does (`CC`, else cc, gcc or clang), in about a second; without one, or with LORAWEAVE_NATIVE=0, what needs
them takes the way of PyTorch, which makes the same. LORAWEAVE_NATIVE may name an older processor as the compiler's -march
does: x86-64 has what every such processor has.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from loraweave.common.files import cache_folder, whole_file

# no -ffast-math: a library linked with it changes how the whole thread rounds
FLAGS = ("-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
_SECONDS = 60

_logger = logging.getLogger(__name__)

# whether something takes notes of torch's operations, which a call of a library is not: tracing, a count of operations
is_watched = torch._C._len_torch_dispatch_stack


@cache
def library(source: Path, *, brief: bool) -> ctypes.CDLL | None:
    """Load the library of a C file; None, with a log line that says why, if it cannot be had.

    The calls of a `brief` one take microseconds, less than another thread's turn would, and keep Python's lock meanwhile.
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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
