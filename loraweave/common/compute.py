"""Fast arithmetic on small arrays by libraries compiled from C files.

A library is compiled for this processor at first use and kept in the cache folder; callers load it once a process. Any C
compiler does (`CC`, else cc, gcc or clang), in about a second; without one, or with LORAWEAVE_NATIVE=0, callers compute the
same in PyTorch. LORAWEAVE_NATIVE may also be a value of the compiler's -march, such as x86-64, to which every processor of
that kind conforms.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loraweave.common.files import cache_folder, whole_file

# no -ffast-math: a library linked with it changes how the whole thread rounds
FLAGS = ("-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
_SECONDS = 60

_logger = logging.getLogger(__name__)

# the number of modes, such as tracing, that record torch's operations: they would not see a call of a compiled library
is_watched = torch._C._len_torch_dispatch_stack


def library(source: Path, functions: Mapping[str, tuple[Any, Sequence[Any]]], *, brief: bool) -> ctypes.CDLL | None:
    """Compile and load the C file `source`; return None if LORAWEAVE_NATIVE is 0, or if compiling fails, which is logged.

    `functions` is {name: (the type of the result, the types of the arguments)}; the library need not have all of them. Pass
    `brief` for functions that take microseconds: to keep Python's lock then costs less than to release it.
    """
    if os.environ.get("LORAWEAVE_NATIVE") == "0":
        return None
    try:
        compiled = (ctypes.PyDLL if brief else ctypes.CDLL)(str(_compiled(source)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _logger.info("PyTorch does the work of the library of %s: %s", source.name, str(said).strip()[:500])
        return None
    for name, (result, arguments) in functions.items():
        if (function := getattr(compiled, name, None)) is not None:
            function.restype, function.argtypes = result, arguments
    return compiled


def _compiled(source: Path) -> Path:
    """Return the path of the library made from a C file, compiled on first use. Raises OSError or SubprocessError."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc, clang, or $CC)")
    named = os.environ.get("LORAWEAVE_NATIVE", "")
    flags = *FLAGS, f"-march={'native' if named in ('', '1') else named}"
    # the processor is a part of the file's name, since several machines may share the cache folder
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
