"""Locks that a forked process gets unlocked: the threads of its parent that held them do not exist in it."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet

_OWNERS: WeakSet[Any] = WeakSet()


def lock_of(owner: Any) -> Any:
    """A reentrant lock to be kept as `owner._lock`; in a forked process, that is another one, which nobody holds.

    No class of its own around the lock: `with` takes one of the interpreter's without a moment at which an interruption
    could leave it taken.
    """
    _OWNERS.add(owner)
    return threading.RLock()


def _renew() -> None:
    for owner in list(_OWNERS):
        owner._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
