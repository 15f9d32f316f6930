"""The library of `native.c`, whose calls take microseconds."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave.common import native

SOURCE = Path(__file__).with_name("native.c")
# as its functions' names end
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
# beyond, products of matrices are faster
MOST_TOKENS = 64


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


def work(num_elements: int) -> Tensor:
    """Memory for the library in fp32, of which one call at a time makes use: it holds Python's lock."""
    if _WORK[0].numel() < num_elements:
        with torch.inference_mode(False):
            _WORK[0] = torch.empty(num_elements, dtype=torch.float32)
    return _WORK[0]


_WORK = [torch.empty(0)]


@cache
def library() -> ctypes.CDLL | None:
    """The library, with its functions' types; None where it cannot be had."""
    found = native.library(SOURCE, brief=True)
    if found is not None:
        for name, num_given in (("add", 3), ("mix", 4)):
            for made in (getattr(found, f"{name}_{dtype}") for dtype in DTYPES.values()):
                made.argtypes, made.restype = [ctypes.c_void_p] * num_given, None
    return found
