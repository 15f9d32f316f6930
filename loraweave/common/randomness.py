"""Random numbers derived from their purpose, which leave the caller's generators unchanged."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

Made = TypeVar("Made")


def seeded(*parts: object) -> torch.Generator:
    """Make a generator on the CPU whose numbers are a function of the parts' representations alone."""
    return generator_of(repr(parts))


def generator_of(text: str) -> torch.Generator:
    """Make a generator on the CPU whose numbers are a function of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def with_seed(seed: int, make: Callable[[], Made]) -> Made:
    """Return make() under a seed of torch; the caller's random numbers continue unaffected."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@contextmanager
def caller_randomness() -> Iterator[None]:
    """Let the block seed the generators of Python, numpy and torch, and restore them afterwards."""
    python, array = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
