"""The library of `native.c`: compiled for this processor at first use, kept in the cache folder, loaded once a process.

Any C compiler does (`CC`, else cc, gcc or clang), in under a second; without one, or with LORAWEAVE_NATIVE=0, the kernels of
PyTorch are taken, which make the same.
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
from typing import Any

import torch
from torch import Tensor

from loraweave.common.files import cache_folder, whole_file

SOURCE = Path(__file__).with_name("native.c")
# no -ffast-math: a library linked with it changes how the whole thread rounds
FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
_SECONDS = 60
# as its functions' names end
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
# beyond, products of matrices are faster
MOST_TOKENS = 64

_logger = logging.getLogger(__name__)


class Table(ctypes.Structure):
    """`Table` of native.c."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("num_rows", "num_tokens", "num_inputs", "num_outputs", "num_factors")
    ] + [(name, ctypes.c_void_p) for name in ("a", "b", "counts", "weights", "work")]


def native_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library is there, for such layers."""
    return device.type == "cpu" and dtype in DTYPES and library() is not None


def function(name: str, dtype: torch.dtype) -> Any:
    """The library's function of that name for a dtype; None where there is none."""
    found = library()
    return None if found is None or dtype not in DTYPES else getattr(found, f"{name}_{DTYPES[dtype]}")


# whether something takes notes of torch's operations, which a call of the library is not: tracing, a count of operations
is_watched = torch._C._len_torch_dispatch_stack


def work(num_elements: int) -> Tensor:
    """Memory for the library in fp32, of which one call at a time makes use: it holds Python's lock."""
    if _WORK[0].numel() < num_elements:
        with torch.inference_mode(False):
            _WORK[0] = torch.empty(num_elements, dtype=torch.float32)
    return _WORK[0]


_WORK = [torch.empty(0)]


@cache
def library() -> ctypes.PyDLL | None:
    """The library; None, and a log line says why, where it cannot be had."""
    if os.environ.get("LORAWEAVE_NATIVE") == "0":
        return None
    try:
        # calls take microseconds, less than another thread's turn would
        found = ctypes.PyDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _logger.info("mixtures run without the library of %s: %s", SOURCE.name, str(said).strip()[:500])
        return None
    for name, num_given in (("add", 3), ("mix", 4)):
        for made in (getattr(found, f"{name}_{dtype}") for dtype in DTYPES.values()):
            made.argtypes, made.restype = [ctypes.c_void_p] * num_given, None
    return found


def _compiled() -> Path:
    """The library's file, made where it is not there yet. OSError or SubprocessError where that fails."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc, clang, or $CC)")
    # for this very processor: a folder may be shared by several machines
    parts = SOURCE.read_bytes(), " ".join(FLAGS).encode(), compiler.encode(), _processor().encode()
    target = cache_folder() / "native" / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.so"
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = target.parent.stat()
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise OSError(f"others may write to {target.parent}, so that nothing is loaded from it: chmod 700, and own it")
    if not target.exists():
        _logger.info("compiling %s with %s, once for this machine; it is kept as %s", SOURCE.name, compiler, target)
        with whole_file(target) as temporary:
            command = [compiler, *FLAGS, "-o", str(temporary), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
    return target


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
