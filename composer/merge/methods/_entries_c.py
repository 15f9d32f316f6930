"""The library of `entries.c`: products of factors, their magnitudes, and pruned merges of them, tile by tile."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

from loraweave.common import native

SOURCE = Path(__file__).with_name("entries.c")
# entries of a tile, and of its width, as in entries.c
TILE, WIDE = 256, 64
_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Expert(ctypes.Structure):
    """The struct `Expert` of entries.c."""

    _fields_ = (
        ("b", _pointer),
        ("a", _pointer),
        ("rank", _int),
        ("weight", _float),
        ("value", _float),
        ("last", _int),
        ("seed", ctypes.c_uint64),
        ("level", _int),
    )


class Merge(ctypes.Structure):
    """The struct `Merge` of entries.c."""

    _fields_ = (
        *((name, _int) for name in ("num_experts", "num_outputs", "num_inputs", "elects", "weighted", "counts", "divides")),
        *((name, _float) for name in ("scale", "tie")),
        *((name, _int) for name in ("cancelled", "balance")),
    )


class Numbers(NamedTuple):
    """The numbers that say which of an expert's entries are left.

    Those are magnitudes above `value`, or equal to it up to the flat index `last`, and of these the ones whose 16 bits from
    the stream of `seed` are below `level` (-1 draws nothing).
    """

    value: float = -1.0
    last: int = -1
    seed: int = 0
    level: int = -1


EVERY = Numbers()


@cache
def library() -> ctypes.CDLL | None:
    """Return the library with its functions' types, or None where it cannot be had."""
    compiled = native.library(SOURCE, brief=False)
    if compiled is not None:
        compiled.read_entries.argtypes = [_pointer, _int, _int, _int, _pointer, _pointer]
        compiled.narrow_entries.argtypes = [_pointer, _int, _int, _float, _float, _pointer, _pointer, _int, _pointer]
        compiled.narrow_entries.restype = _int
        compiled.merge_entries.argtypes = [_pointer, _pointer, _int, _int, _pointer, _pointer]
        compiled.read_entries.restype = compiled.merge_entries.restype = None
    return compiled
