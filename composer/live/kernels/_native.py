"""The library of `native.c`, whose calls take microseconds."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave.common import compute

SOURCE = Path(__file__).with_name("native.c")
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# dtypes of x and y, each with those that its factors may be stored in; float16 needs a processor that converts it
STORED = {torch.float32: (torch.float32, torch.float16, torch.bfloat16), torch.bfloat16: (torch.bfloat16,)}
# as in native.c: NARROW handles this many numbers at once
LANES = 16
# with more tokens, products of matrices are faster
MOST_TOKENS = 64


class Table(ctypes.Structure):
    """The struct `Table` of native.c."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("num_rows", "num_tokens", "num_inputs", "num_outputs", "num_factors")
    ] + [(name, ctypes.c_void_p) for name in ("a", "b", "counts", "weights", "work")]


def native_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the library is there, for layers of this device and dtype."""
    return device.type == "cpu" and dtype in STORED and library() is not None


def function(dtype: torch.dtype, stored: torch.dtype) -> Any:
    """Return the library's `add` for x and y of a dtype and factors stored in another; None where there is none."""
    if dtype not in STORED or stored not in STORED[dtype]:
        return None
    return getattr(library(), f"add_{NAMES[stored]}_{NAMES[dtype]}", None)


def shorten(*matrices: Tensor) -> list[Tensor] | None:
    """Return the fp32 matrices in float16, else in bfloat16, if that changes no number; else None.

    Most adapters are stored in 16 bits, and a step of few tokens spends its time on reading factors.
    """
    if any(m.dtype is not torch.float32 or not m.is_contiguous() or m.numel() % LANES for m in matrices):
        return None
    for stored in STORED[torch.float32][1:]:
        narrow = getattr(library(), f"narrow_{NAMES[stored]}", None)
        if narrow is None:
            continue
        with torch.inference_mode(False):
            narrowed = [torch.empty_like(matrix, dtype=stored) for matrix in matrices]
        if all(narrow(m.data_ptr(), short.data_ptr(), m.numel()) for m, short in zip(matrices, narrowed, strict=True)):
            return narrowed
    return None


def work(num_elements: int) -> Tensor:
    """Return memory for the library in fp32, which one call at a time uses: a call holds Python's lock."""
    if _WORK[0].numel() < num_elements:
        with torch.inference_mode(False):
            _WORK[0] = torch.empty(num_elements, dtype=torch.float32)
    return _WORK[0]


_WORK = [torch.empty(0)]


@cache
def library() -> ctypes.CDLL | None:
    """Return the library with its functions' types, or None where it cannot be had."""
    cdll = compute.library(SOURCE, brief=True)
    if cdll is None:
        return None
    pairs = [f"{NAMES[stored]}_{NAMES[dtype]}" for dtype, forms in STORED.items() for stored in forms]
    argument_types: dict[str, list[Any]] = {f"add_{pair}": [ctypes.c_void_p] * 4 for pair in pairs}
    argument_types |= {f"narrow_{short}": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64] for short in ("f16", "bf16")}
    for name, types in argument_types.items():
        # the library has those for float16 only if the processor converts it
        if (made := getattr(cdll, name, None)) is not None:
            made.argtypes, made.restype = types, ctypes.c_int if name.startswith("narrow") else None
    return cdll
