"""The error for a name that a pool has not: the names that were perhaps meant, and some of those there are."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

from loraweave.errors import UnknownExpert
from loraweave.hub.names import near_misses

# a pool may have thousands, and a message is read by a person
NUM_SHOWN = 8


def unknown_expert(name: object, known: Collection[str]) -> UnknownExpert:
    """The error to raise for `name`, which is not among `known`."""
    close = near_misses(str(name), known)
    hint = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
    shown = ", ".join(map(repr, islice(known, NUM_SHOWN)))
    more = f" and {len(known) - NUM_SHOWN} more" if len(known) > NUM_SHOWN else ""
    return UnknownExpert(f"no expert {name!r} in the pool{hint}; it has {shown}{more}")
