"""Paging: the experts' factors on the layers' devices, copied there when they are used, within a budget.

    a file of the hub                the CPU's memory                    a device
    Adapter, mapped   --- flats --->  page on the shelf _host  --- copy --->  page on the shelf _device
                                      layers on the CPU use it as it is,
                                      for a device it is the pinned copy

    a page      absent -- lease: room reserved --> empty -- fill --> in use -- release --> idle -- room wanted --> absent
                                                                       ^------ lease -------'

An activation leases its experts. All room is reserved before anything is read, so that BudgetExceeded changes nothing. The
first lease that needs a page fills it, under the slot's own lock; others wait. Idle pages are dropped when others need their
bytes, least recently used first (`Shelf`). When the model moves, `_moves` counts up, and old pages' keys are never used
again. An expert is one flat tensor for each device and dtype (`pages.py`): one allocation, one copy. The naive twin is
`place_factors`, one layer's tensors at a time, which also serves a layer whose place was not known;
`tests/composer/live/test_residents.py` compares both with the adapter's own numbers.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loraweave.common.process import lock_of
from loraweave.composer.live.pages import Layout, Place, PlacedFactors, Shelf, Slot, place_factors
from loraweave.errors import CompositionError
from loraweave.hub.adapter import Adapter


def is_accelerator(device: torch.device) -> bool:
    """Return True for every device but the CPU, since factors reach it through the CPU's memory."""
    return device.type != "cpu"


class _Key(NamedTuple):
    """The cache key of an expert's factors, or of their host `copy`; `moves` counts changes of the layers' places."""

    name: str
    copy: bool
    moves: int


@dataclass(frozen=True, eq=False)
class _Page:
    """The factors of one expert: flat tensors, and `parts`, {layer: views}; `ready` are CUDA events of their copies."""

    flats: Mapping[Place, Tensor]
    parts: Mapping[str, PlacedFactors] = field(default_factory=dict)
    ready: tuple[torch.cuda.Event, ...] = ()


class Residents:
    """A cache that lends experts' factors on the devices of their layers. Any thread may lease, prefetch and release.

    `adapter` returns an expert, bound to the base model; `places` the device and dtype that each layer has now, if known.
    Experts stay after their last lease until their bytes are needed; the least recently used go first. `device_budget_bytes`
    is for all devices that `staged` accepts, `host_budget_bytes` for the CPU's memory: the factors of layers on the CPU, and
    the copies from which devices are filled. None sets no limit.
    """

    def __init__(
        self,
        adapter: Callable[[str], Adapter],
        places: Callable[[], Mapping[str, Place]],
        *,
        device_budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        staged: Callable[[torch.device], bool] = is_accelerator,
    ) -> None:
        self._adapter = adapter
        self._places_now = places
        self._staged = staged
        self._lock = lock_of(self)
        # one expert at a time goes by way of the host, so that room for one is enough there
        self._staging = threading.Lock()
        self._places: Mapping[str, Place] = {}
        self._moves = 0
        self._layouts: dict[Hashable, Layout] = {}
        self._layout_of: dict[str, Layout] = {}
        self._device: Shelf[_Key, _Page] = Shelf("device_budget_bytes", device_budget_bytes)
        self._host: Shelf[_Key, _Page] = Shelf("host_budget_bytes", host_budget_bytes)
        self._num_leases: Counter[str] = Counter()
        self._hits = self._misses = self._from_disk = self._to_device = 0
        self._worker: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def take_from(self, adapter: Callable[[str], Adapter], places: Callable[[], Mapping[str, Place]]) -> None:
        """Replace the functions that return experts and places; the caller must `forget` names that have changed meaning."""
        with self._lock:
            self._adapter, self._places_now = adapter, places

    def lease(self, names: Iterable[str]) -> Lease:
        """Return a lease of the named experts, which stay on their layers' devices until it is released.

        Raises BudgetExceeded, with nothing allocated or evicted, if they do not fit beside those of other leases, and the
        errors of opening an adapter.
        """
        lease = self._take(tuple(dict.fromkeys(names)))
        try:
            lease.fill()
        except BaseException:
            lease.release()
            raise
        return lease

    def prefetch(self, names: Iterable[str]) -> Future[None]:
        """Bring the named experts to their layers' devices in a background thread; the future ends when they are there.

        The future carries any error, which a lease of the same experts raises again.
        """
        wanted = tuple(names)
        with self._lock:
            self._forget_other_processes()
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="loraweave-prefetch")
            return self._worker.submit(lambda: self.lease(wanted).release())

    def settle(self) -> None:
        """Wait until all prefetches begun so far have ended, with or without an error."""
        with self._lock:
            self._forget_other_processes()
            done = None if self._worker is None else self._worker.submit(lambda: None)
        if done is not None:
            done.result()

    def in_use(self, name: str) -> bool:
        """Return True if any open lease has the expert."""
        with self._lock:
            return self._num_leases[name] > 0

    def forget(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Drop the experts whose names `wanted` accepts, except those in use; the names may then mean other experts."""
        with self._lock:
            self._layout_of = {name: layout for name, layout in self._layout_of.items() if not wanted(name)}
            # a merge may have ranks that no other adapter has
            in_use = set(map(id, self._layout_of.values()))
            self._layouts = {key: layout for key, layout in self._layouts.items() if id(layout) in in_use}
            for shelf in (self._device, self._host):
                shelf.drop(lambda key: wanted(key.name))

    def close(self) -> None:
        """End prefetching, and drop all experts that are not in use."""
        self._forget_other_processes()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(cancel_futures=True)
        self.forget()

    @property
    def residency(self) -> Residency:
        """The hits, misses, evictions and copied bytes so far, and the resident experts and their bytes now."""
        with self._lock:
            return Residency(
                num_hits=self._hits,
                num_misses=self._misses,
                num_evictions=self._device.num_evictions + self._host.num_evictions,
                bytes_from_disk=self._from_disk,
                bytes_to_device=self._to_device,
                num_on_device=len(self._device),
                num_on_host=len(self._host),
                device_bytes=self._device.num_bytes,
                host_bytes=self._host.num_bytes,
                device_budget_bytes=self._device.budget_bytes,
                host_budget_bytes=self._host.budget_bytes,
            )

    def _forget_other_processes(self) -> None:
        """After a fork, drop the parent's threads and the locks that they held."""
        if self._process != os.getpid():
            self._process, self._worker, self._staging = os.getpid(), None, threading.Lock()
            for shelf in (self._device, self._host):
                shelf.unlock()

    def _take(self, names: tuple[str, ...]) -> Lease:
        """Return a lease of the named experts with memory reserved for their factors, which may not be copied there yet."""
        what = f"the {len(names)} experts of this activation" if len(names) != 1 else f"the factors of expert {names[0]!r}"
        while True:
            moves, layouts, opened = self._lay_out(names)
            with self._lock:
                self._forget_other_processes()
                if moves != self._moves:
                    continue
                keys = {_Key(name, False, moves): layouts[name] for name in names}
                on_device = {key: size for key, layout in keys.items() if (size := layout.num_bytes[True])}
                on_host = {key: size for key, layout in keys.items() if (size := layout.num_bytes[False])}
                passing = max((size for key, size in on_device.items() if key not in self._device), default=0)
                self._host.require_room({**on_host, _Key("", True, moves): passing}, what)
                taken = (self._device.take(on_device, what), self._host.take(on_host, what))
                missing = {key for slots in taken for key, slot in slots.items() if slot.thing is None}
                self._misses += len(missing)
                self._hits += len(names) - len(missing)
                self._num_leases.update(names)
                return Lease(self, moves, layouts, *taken, opened)

    def _lay_out(self, names: tuple[str, ...]) -> tuple[int, dict[str, Layout], list[Adapter]]:
        """Return (number of changes of layers' places so far, {expert: its layout for the places now}, adapters opened)."""
        opened: dict[str, Adapter] = {}
        while True:
            with self._lock:
                # under the lock, so that places read earlier do not replace newer ones
                places = dict(self._places_now())
                if any(places.get(layer) != place for layer, place in self._places.items()):
                    self._moves += 1
                    self._layouts, self._layout_of = {}, {}
                    for shelf in (self._device, self._host):
                        shelf.drop(lambda key: True)
                self._places = places
                for name, adapter in opened.items():
                    parts = tuple((part.rank, part.gain_O is None, part.bias_O is None) for part in adapter.layers.values())
                    if (key := (adapter.form, parts)) not in self._layouts:
                        self._layouts[key] = Layout(adapter, self._places, self._staged)
                    self._layout_of.setdefault(name, self._layouts[key])
                unknown = [name for name in names if name not in self._layout_of]
                if not unknown:
                    return self._moves, {name: self._layout_of[name] for name in names}, list(opened.values())
            # opening the first adapter with a layer may make the layer's place known, so read the places again
            opened |= {name: self._adapter(name) for name in unknown}

    def _make_host_page(self, name: str, layout: Layout) -> _Page:
        adapter = self._adapter(name)
        flats = layout.make_flats(adapter, staged=False)
        with self._lock:
            self._from_disk += layout.num_bytes[False]
        return _Page(flats, layout.make_views(flats, adapter, staged=False))

    def _make_device_page(self, name: str, layout: Layout, moves: int) -> _Page:
        size = layout.num_bytes[True]
        with self._staging:
            key = _Key(name, True, moves)
            with self._lock:
                taken = self._host.take({key: size}, f"the host's copy of expert {name!r}")
            try:
                if (page := taken[key].thing) is None:
                    pinned = any(place[0].type == "cuda" for place in layout.places)
                    page = taken[key].thing = _Page(layout.make_flats(self._adapter(name), staged=True, pinned=pinned))
                    with self._lock:
                        self._from_disk += size
                flats = {
                    place: torch.empty_like(flat, device=place[0]).copy_(flat, non_blocking=True)
                    for place, flat in page.flats.items()
                }
            finally:
                with self._lock:
                    self._host.give_back(taken)
        with self._lock:
            self._to_device += size
        events = [torch.cuda.current_stream(place[0]).record_event() for place in flats if place[0].type == "cuda"]
        return _Page(flats, layout.make_views(flats, None, staged=True), tuple(events))

    def _give_back(self, lease: Lease) -> None:
        with self._lock:
            self._device.give_back(lease.on_device)
            self._host.give_back(lease.on_host)
            self._num_leases -= Counter(lease.names)
            if lease.moves != self._moves:
                for shelf in (self._device, self._host):
                    shelf.drop(lambda key: key.moves != self._moves)


@dataclass(eq=False, repr=False)
class Lease:
    """A hold on experts, which stay on their layers' devices until `release`."""

    _residents: Residents
    moves: int
    _layouts: Mapping[str, Layout]
    on_device: Mapping[_Key, Slot[_Page]]
    on_host: Mapping[_Key, Slot[_Page]]
    # held until the pages are filled, so that none is opened twice
    _opened: list[Adapter]
    _parts: dict[str, dict[str, PlacedFactors]] = field(default_factory=dict)
    _elsewhere: dict[tuple[str, str], PlacedFactors] = field(default_factory=dict)
    _released: bool = False
    # called once, when it is released
    at_end: Callable[[], None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the experts that are leased."""
        return tuple(self._layouts)

    def fill(self) -> None:
        """Fill the pages that are empty; wait for those that another thread is filling."""
        for name, layout in self._layouts.items():
            key = _Key(name, False, self.moves)
            parts: dict[str, PlacedFactors] = {}
            if (slot := self.on_device.get(key)) is not None:
                page = _fill_slot(slot, partial(self._residents._make_device_page, name, layout, self.moves))
                for event in page.ready:
                    torch.cuda.current_stream(event.device).wait_event(event)
                parts |= page.parts
            if (slot := self.on_host.get(key)) is not None:
                parts |= _fill_slot(slot, partial(self._residents._make_host_page, name, layout)).parts
            self._parts[name] = parts
        self._opened = []

    def renew(self) -> Lease:
        """Return another lease of the same factors, which may outlast this one. Raises CompositionError after `release`."""
        residents = self._residents
        with residents._lock:
            if self._released:
                raise CompositionError("this activation is closed, and runs nothing: call run() while it is open")
            taken = [
                shelf.take({key: slot.num_bytes for key, slot in slots.items()}, "they")
                for shelf, slots in ((residents._device, self.on_device), (residents._host, self.on_host))
            ]
            residents._num_leases.update(self.names)
            return Lease(residents, self.moves, self._layouts, taken[0], taken[1], [], self._parts, dict(self._elsewhere))

    def layers_of(self, name: str) -> frozenset[str]:
        """Return the layers that the expert has factors in, on any device."""
        return self._layouts[name].layers

    def placed(self, name: str) -> Mapping[str, PlacedFactors]:
        """Return {layer: the expert's factors} for the layers whose device and dtype were known."""
        return self._parts[name]

    def part(self, name: str, layer: str, device: torch.device, dtype: torch.dtype) -> PlacedFactors | None:
        """Return the expert's factors in a layer, on that device and in that dtype; None if it has none.

        If the layer's place was unknown, or has changed since, its factors are placed again, outside the budget.
        """
        factors = self._parts[name].get(layer)
        if factors is None and layer not in self._layouts[name].layers:
            return None
        if factors is None or factors.a_RI.device != device or factors.a_RI.dtype != dtype:
            factors = self._elsewhere.get((name, layer))
            if factors is None or factors.a_RI.device != device or factors.a_RI.dtype != dtype:
                with torch.inference_mode(False), torch.no_grad():
                    factors = place_factors(self._residents._adapter(name).layers[layer], device, dtype)
                self._elsewhere[name, layer] = factors
        return factors

    def release(self) -> None:
        """Give the experts back; further calls do nothing."""
        with self._residents._lock:
            if self._released:
                return
            self._released = True
        if self.at_end is not None:
            self.at_end()
        self._parts, self._elsewhere, self._opened = {}, {}, []
        self._residents._give_back(self)


def _fill_slot(slot: Slot[_Page], make: Callable[[], _Page]) -> _Page:
    with slot.lock:
        if slot.thing is None:
            # ordinary tensors even below inference_mode: a later training step may have to save them
            with torch.inference_mode(False), torch.no_grad():
                slot.thing = make()
        return slot.thing


@dataclass(frozen=True)
class Residency:
    """The hits and misses since the Composer was made, and the experts resident now. A budget of None sets no limit.

    A hit is an expert of an activation (or prefetch) that was on its layers' devices; a miss had to be copied there. `host`
    is the CPU's memory: the experts of layers on the CPU, and copies kept for other devices. Factors that stay mapped from
    the hub's file count as resident, though the operating system may drop their pages.
    """

    num_hits: int
    num_misses: int
    num_evictions: int
    bytes_from_disk: int
    bytes_to_device: int
    num_on_device: int
    num_on_host: int
    device_bytes: int
    host_bytes: int
    device_budget_bytes: int | None
    host_budget_bytes: int | None

    def __str__(self) -> str:
        num_requests = self.num_hits + self.num_misses
        share = f" ({self.num_hits / num_requests:.0%})" if num_requests else ""
        return "\n".join(
            [
                f"hits       {self.num_hits:,} of {num_requests:,}{share}, {self.num_evictions:,} evictions",
                f"moved      {_size(self.bytes_from_disk)} disk to host, {_size(self.bytes_to_device)} host to device",
                f"on device  {_describe(self.num_on_device, self.device_bytes, self.device_budget_bytes)}",
                f"on host    {_describe(self.num_on_host, self.host_bytes, self.host_budget_bytes)}",
            ]
        )


def _describe(number: int, size: int, budget: int | None) -> str:
    limit = "no limit" if budget is None else f"{size / budget:.0%} of {_size(budget)}"
    return f"{number:,} experts, {_size(size)} ({limit})"


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
