"""A store of things of known size under a limit: those used last stay, those in use always."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

from loraweave.common.checks import is_whole
from loraweave.errors import BudgetExceeded, CompositionError

Key = TypeVar("Key", bound=Hashable)
Thing = TypeVar("Thing")


class Slot(Generic[Thing]):
    """A place on a shelf. `thing` is None until the first user has made it, which it does under `lock`."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_users = 0
        self.thing: Thing | None = None
        self.lock = threading.Lock()


class Shelf(Generic[Key, Thing]):
    """The slots by key, at most `budget_bytes` together (None: no limit). The caller holds one lock around every call."""

    def __init__(self, option: str, budget_bytes: int | None) -> None:
        if budget_bytes is not None and not is_whole(budget_bytes, 1):
            raise CompositionError(
                f"{option} is {budget_bytes!r}; it is a number of bytes, at least 1, or None for no limit"
            )
        self.option = option
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.num_evictions = 0
        self._slots: dict[Key, Slot[Thing]] = {}
        # those without a user, the one used longest ago first
        self._idle: OrderedDict[Key, Slot[Thing]] = OrderedDict()
        self._bytes_in_use = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def require_room(self, sizes: Mapping[Key, int], what: str) -> None:
        """Raise BudgetExceeded when these do not fit beside the others that are in use; nothing has changed then."""
        if self.budget_bytes is None:
            return
        shared = [key for key in sizes if key in self._slots and key not in self._idle]
        others = self._bytes_in_use - sum(self._slots[key].num_bytes for key in shared)
        needed = sum(sizes.values())
        if others + needed > self.budget_bytes:
            beside = f" beside the {others:,} that open activations use" if others else ""
            raise BudgetExceeded(
                f"{what} need {needed:,} bytes{beside}, but {self.option} is {self.budget_bytes:,}; activate fewer experts "
                f"at once, close activations that are open, or make the Composer with a larger {self.option}"
            )

    def take(self, sizes: Mapping[Key, int], what: str) -> dict[Key, Slot[Thing]]:
        """Return a slot for each key, in use until `give_back`; new ones are empty. Others go, those used longest ago first.

        Raises BudgetExceeded, naming `what` was to be taken, when they do not fit beside what is in use.
        """
        self.require_room(sizes, what)
        taken = {key: self._use(self._slots[key]) for key in sizes if key in self._slots}
        for key in taken:
            self._idle.pop(key, None)
        fresh = {key: size for key, size in sizes.items() if key not in taken}
        self._make_room(sum(fresh.values()))
        for key, size in fresh.items():
            taken[key] = self._slots[key] = self._use(Slot(size))
            self.num_bytes += size
        return taken

    def give_back(self, taken: Mapping[Key, Slot[Thing]]) -> None:
        """End one use of each slot; drop those that were never filled."""
        for key, slot in taken.items():
            slot.num_users -= 1
            if slot.num_users == 0:
                self._bytes_in_use -= slot.num_bytes
                self._idle[key] = slot
                if slot.thing is None:
                    self._remove(key)

    def drop(self, unwanted: Callable[[Key], bool]) -> None:
        """Drop what is unwanted and not in use."""
        for key in [key for key in self._idle if unwanted(key)]:
            self._remove(key)

    def unlock(self) -> None:
        """Free the locks of all slots, whose holders may be no more."""
        for slot in self._slots.values():
            slot.lock = threading.Lock()

    def _use(self, slot: Slot[Thing]) -> Slot[Thing]:
        if slot.num_users == 0:
            self._bytes_in_use += slot.num_bytes
        slot.num_users += 1
        return slot

    def _make_room(self, num_bytes: int) -> None:
        while self.budget_bytes is not None and self.num_bytes + num_bytes > self.budget_bytes:
            self._remove(next(iter(self._idle)))
            self.num_evictions += 1

    def _remove(self, key: Key) -> None:
        slot = self._slots.pop(key)
        del self._idle[key]
        slot.thing = None
        self.num_bytes -= slot.num_bytes
