"""The compositions that the server has loaded: adapters in the engine, and the number of rows that use each.

A composition is kept while all its adapters are in the engine, so that an account of the engine's adapters has all of them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from loraweave.common.process import give_back_freed_memory
from loraweave.composer.composer import Composer
from loraweave.composer.live.hook import hook_kinds
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.serving.names import Served

# bytes of what an engine makes for batches that it keeps for later ones, and of a dropped adapter whose memory is given back
KEPT_BYTES = 1 << 24


@dataclass
class Loaded:
    """A loaded adapter, or a loaded router with a Composer of its own.

    `size` is in bytes, and `last_use` the time of its loading or last release, by `time.monotonic`.
    """

    size: int
    last_use: float
    routed: tuple[Composer, TokenRouter] | None = None
    is_merge: bool = False


class Experts:
    """A Composer with the adapters that rows use, and at most `most` unused adapters: those that were used last.

    Adapters are known by content hash: the hub may give a name to another adapter while a row still runs with the first.
    A router needs a pool of exactly its own adapters, so it has a Composer of its own, kept with its composition.
    Compositions are known by identity while their adapters are loaded, at most `most` of them.
    Any thread may call `load`, `hold`, `pin`, `take` and `release`; the other methods are for the model's own thread.
    """

    def __init__(self, model: Any, tokenizer: Any, most: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._most = most
        # the most bytes of an adapter's value in a kernel: on a CPU, factors in half precision may be widened
        self.copied_bytes = int(max(model.dtype.itemsize, torch.float32.itemsize))
        # the bytes of a loaded adapter's value: the engine copies no value of fp32 on a CPU
        is_copied = model.device.type != "cpu" or model.dtype != torch.float32
        self._value_bytes = int(torch.float32.itemsize + is_copied * model.dtype.itemsize)
        self._engine: Composer | None = None
        self._num_users: Counter[str] = Counter()
        # by content hash, or a router by its composition's identity; the one loaded longest ago first
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._compositions: OrderedDict[str, Served] = OrderedDict()
        # the rows of the last call, whether it read prompts, and the rows' weights
        self._active: tuple[Sequence[Served], bool, MixtureWeights] | None = None
        self._loading = threading.Lock()
        self._lock = threading.Lock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The content hashes of the loaded adapters, the one needed longest ago first."""
        return tuple(key for key, loaded in self._loaded.items() if loaded.routed is None)

    def unused(self) -> dict[str, Loaded]:
        """Return the loaded adapters and routers that no row uses, by key."""
        with self._lock:
            return {key: loaded for key, loaded in self._loaded.items() if not self._num_users[key]}

    def loaded_sizes(self, *, merges: bool) -> list[int]:
        """Return the bytes of each loaded merge, or of each other loaded adapter and router."""
        with self._lock:
            return [loaded.size for loaded in self._loaded.values() if loaded.is_merge is merges]

    def drop_oldest(self) -> None:
        """Unload the unused adapter or router whose last use was longest ago, if there still is one."""
        with self._loading, self._lock:
            unused = {key: loaded.last_use for key, loaded in self._loaded.items() if not self._num_users[key]}
            if unused:
                self._drop(min(unused, key=lambda key: unused[key]))

    def used_bytes(self, rows: Sequence[Any]) -> int:
        """Return the bytes of the loaded adapters and routers that are in use, and of those that rows need."""
        with self._lock:
            sizes = {key: loaded.size for key, loaded in self._loaded.items() if self._num_users[key]}
        for row in rows:
            sizes |= {key: self._size(row.served, key) for key in row.served.needs if key not in sizes}
        return sum(sizes.values())

    def missing_bytes(self, adapters: Collection[Adapter], num_values: int) -> int:
        """Return the bytes of the adapters that are not loaded, of `num_values` more values, and of their kernels."""
        with self._lock:
            missing = {adapter.hash: adapter for adapter in adapters if adapter.hash not in self._loaded}
        copied = (num_values or sum(adapter.num_values for adapter in adapters)) * self.copied_bytes
        return self.bytes_of(missing.values()) + num_values * self._value_bytes + copied

    def _size(self, served: Served, key: str) -> int:
        """Return the bytes of one adapter of a composition, or of all adapters of its router."""
        return self.bytes_of(served.all_adapters.values() if served.router is not None else [served.all_adapters[key]])

    def bytes_of(self, adapters: Iterable[Adapter]) -> int:
        """Return the bytes of loaded adapters: their factors in fp32, and the engine's copies, if it needs any."""
        device, dtype = self._model.device, self._model.dtype
        hooks = [hook for hook in hook_kinds() if device.type in hook.devices]
        num_bytes = 0
        for adapter in adapters:
            num_bytes += adapter.num_values * self._value_bytes
            for hook in hooks:
                num_bytes += hook.bytes_beside(adapter, device, dtype)
        return num_bytes

    def load(self, served: Served) -> None:
        """Load those of a composition's adapters, or its router, that are not loaded yet, while other rows run.

        Raises BaseModelMismatch, LayerMismatch or AdapterUnsupported for an adapter that does not fit, WeightingError for a
        weight outside the range of fp32.
        """
        with self._loading:
            for member in served.members:
                MixtureWeights.of([member.weights], tuple(member.weights))
            missing: list[str] = []
            with self._lock:
                for key in served.needs:
                    if key not in self._loaded:
                        missing.append(key)
                    else:
                        # it is now the last to be unloaded
                        self._loaded.move_to_end(key)
            for key in missing:
                routed, adapter = None, served.all_adapters.get(key)
                if served.router is not None:
                    engine = Composer(self._model, ExpertPool(served.all_adapters), tokenizer=self._tokenizer)
                    served.router.require_engine(engine)
                    routed = engine, served.router
                else:
                    if self._engine is None:
                        self._engine = Composer(self._model, ExpertPool({key: served.all_adapters[key] for key in missing}))
                    elif key not in self._engine.pool.names:
                        self._engine.load(key, served.all_adapters[key])
                    self._engine.prefetch(key)
                with self._lock:
                    # from now on it may be unloaded
                    is_merge = adapter is not None and "recipe" in adapter.card
                    self._loaded[key] = Loaded(self._size(served, key), time.monotonic(), routed, is_merge)

    def hold(self, identity: str) -> Served | None:
        """Return the loaded composition of this identity, reserved until `release`; None if there is none."""
        with self._lock:
            served = self._compositions.get(identity)
            if served is not None:
                self._compositions.move_to_end(identity)
                self._num_users.update(served.needs)
            return served

    def pin(self, served: Served) -> None:
        """Reserve the adapters or the router of a composition, which need not be loaded yet, until `release`."""
        with self._lock:
            self._num_users.update(served.needs)

    def release(self, served: Served) -> None:
        """End one reservation of a composition; `trim` unloads adapters that nobody uses."""
        with self._lock:
            self._num_users.subtract(served.needs)
            self._num_users = +self._num_users
            for key in served.needs:
                if key in self._loaded:
                    self._loaded[key].last_use = time.monotonic()

    def take(self, served: Served) -> None:
        """Reserve the adapters or the router of a composition until `release`, loading them if necessary.

        Afterwards `hold` finds the composition. Raises the errors of `load`, and reserves nothing then.
        """
        with self._lock:
            self._num_users.update(served.needs)
            is_loaded = self._loaded.keys() >= set(served.needs)
        if not is_loaded:
            try:
                self.load(served)
            except BaseException:
                self.release(served)
                raise
        with self._lock:
            self._compositions[served.identity] = served
            if len(self._compositions) > self._most:
                self._compositions.popitem(last=False)

    def give_back(self, served: Served) -> None:
        """Release the adapters or the router of a row, and unload unused ones beyond the limit."""
        self._forget_batch()
        self.release(served)
        self.trim()

    def _forget_batch(self) -> None:
        """Drop what the engine has made for the last batch, unless it is small."""
        self._active = None
        if self._engine is not None and self._engine._plans.keep(KEPT_BYTES):
            give_back_freed_memory()

    def trim(self) -> None:
        """Unload unused adapters and routers beyond the limit; do nothing while a thread is loading."""
        if not self._loading.acquire(blocking=False):
            return
        try:
            with self._lock:
                for is_routed in (False, True):
                    of_kind = [key for key, loaded in self._loaded.items() if (loaded.routed is not None) is is_routed]
                    unused = [key for key in of_kind if not self._num_users[key]]
                    for key in unused[: max(0, len(unused) - self._most)]:
                        self._drop(key)
        finally:
            self._loading.release()

    def activate(self, rows: Sequence[Served], *, reads: bool = False) -> AbstractContextManager[Any]:
        """Return a context for one call of the model with one batch entry for each member of each row, under its mixture.

        If one row has a router, all rows must have the same. `reads` is True if the call reads prompts, for which the engine
        may choose other kernels than for a step.
        """
        if rows[0].router is not None:
            routed = self._loaded[rows[0].identity].routed
            assert routed is not None
            return routed[0].activate(routed[1])
        if self._engine is None:
            return nullcontext()
        if self._active is None or self._active[:2] != (rows, reads):
            self._forget_batch()
            weights: list[Mapping[str, float]] = []
            contents: dict[str, float] = {}
            for served in rows:
                for member in served.members:
                    weights.append(member.weights)
                    contents |= member.weights
            self._active = rows, reads, MixtureWeights.of(weights, tuple(contents))
        return self._engine.activate(self._active[2])

    def _drop(self, key: str) -> None:
        for identity in [identity for identity, served in self._compositions.items() if key in served.needs]:
            del self._compositions[identity]
        if (routed := self._loaded.pop(key).routed) is not None:
            routed[0].close()
            return
        assert self._engine is not None
        if self.loaded:
            self._engine.unload(key)
        else:
            # a pool cannot be empty
            self._engine.close()
            self._engine = None
