"""Adapters that are not in memory: their names are known, and each is opened when it is asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Self
from weakref import WeakValueDictionary

from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter

# an open adapter is hundreds of views of mapped memory, about half a megabyte of objects
NUM_KEPT = 32


class OnDemand(Mapping[str, Adapter]):
    """Adapters by name, in the order of `names`; `opener` gives one, and the `num_kept` asked for last stay open.

    An adapter that somebody still holds is the same object when it is asked for again. `opener` must give the same content
    every time; several threads may call it at once. Raises WeightingError for a repeated name, and what `opener` raises.
    """

    def __init__(self, names: Iterable[str], opener: Callable[[str], Adapter], *, num_kept: int = NUM_KEPT) -> None:
        listed = tuple(names)
        # a dict keeps their order, and knows what is among them; None stands for one that is opened
        self._adapters: dict[str, Adapter | None] = dict.fromkeys(listed)
        if len(self._adapters) != len(listed):
            twice = next(name for number, name in enumerate(listed) if name in listed[:number])
            raise WeightingError(f"the pool has several adapters named {twice!r}; give every name once")
        self._opened = _Opened(opener, num_kept)

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name] or self._opened.get(name)

    def __contains__(self, name: object) -> bool:
        # that of Mapping would open it
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def num_open(self) -> int:
        """How many adapters are open now, because they were asked for lately or because somebody holds them."""
        return len(self._opened.alive)

    def subset(self, names: Iterable[str]) -> OnDemand:
        """The named ones, in the order given."""
        return self._sharing({name: self._adapters[name] for name in names})

    def including(self, name: str, adapter: Adapter) -> OnDemand:
        """These and one that is in memory, at the end; under a name that is there already, in its place."""
        return self._sharing(self._adapters | {name: adapter})

    def __repr__(self) -> str:
        return f"OnDemand({len(self):,} adapters, {self.num_open:,} open)"

    def _sharing(self, adapters: dict[str, Adapter | None]) -> Self:
        other = object.__new__(type(self))
        other._adapters, other._opened = adapters, self._opened
        return other


class _Opened:
    """The adapters that are open, shared by all that have one opener."""

    def __init__(self, opener: Callable[[str], Adapter], num_kept: int) -> None:
        self._opener = opener
        self._num_kept = num_kept
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        self.alive: WeakValueDictionary[str, Adapter] = WeakValueDictionary()

    def get(self, name: str) -> Adapter:
        found = self.alive.get(name)
        if found is None:
            # outside the lock, so that others need not wait for this file
            found = self._opener(name)
        with self._lock:
            found = self.alive.setdefault(name, found)
            self._kept[name] = found
            self._kept.move_to_end(name)
            while len(self._kept) > self._num_kept:
                self._kept.popitem(last=False)
        return found
