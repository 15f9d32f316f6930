"""The adapters that the server's engine has loaded, and the number of rows that use each."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.live.hook import hook_kinds
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.serving.names import Served


@dataclass
class Loaded:
    """A loaded adapter, or a loaded router with a Composer of its own.

    `last_use` is the time of its loading or last release, by `time.monotonic`; `measure` returns the bytes of its adapters.
    """

    measure: Callable[[], int]
    last_use: float
    routed: tuple[Composer, TokenRouter] | None = None

    @cached_property
    def size(self) -> int:
        """The bytes of its adapters."""
        return self.measure()


class Experts:
    """A Composer with the adapters that rows use, and at most `most` unused adapters: those that were used last.

    Adapters are known by content hash: the hub may give a name to another adapter while a row still runs with the first.
    A router needs a pool of exactly its own adapters, so it has a Composer of its own, kept with its composition.
    Any thread may call `load` and `has`; the other methods are for the thread that runs the model.
    """

    def __init__(self, model: Any, tokenizer: Any, most: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._most = most
        self._engine: Composer | None = None
        self._num_users: Counter[str] = Counter()
        # by content hash, or a router by its composition's identity; the one loaded longest ago first
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        # the rows of the last call, and their weights
        self._active: tuple[Sequence[Served], MixtureWeights] | None = None
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

    def drop_oldest(self) -> None:
        """Unload the unused adapter or router whose last use was longest ago."""
        unused = self.unused()
        with self._loading, self._lock:
            self._drop(min(unused, key=lambda key: unused[key].last_use))

    def sizes(self, served: Served) -> dict[str, int]:
        """Return {key: bytes in the engine} of a composition's adapters, or of its router."""
        return {key: self._size(served, key) for key in served.needs}

    def _size(self, served: Served, key: str) -> int:
        """Return the bytes in the engine of one adapter of a composition, or of its router."""
        device, dtype = self._model.device, self._model.dtype
        if served.router is not None:
            return int(dtype.itemsize * sum(adapter.num_values for adapter in served.all_adapters.values()))
        adapter = served.all_adapters[key]
        beside = [hook.bytes_beside(adapter, device, dtype) for hook in hook_kinds()]
        return int(dtype.itemsize * adapter.num_values + sum(beside))

    def has(self, served: Served) -> bool:
        """Return True if a composition's adapters, or its router, are loaded."""
        with self._lock:
            return self._loaded.keys() >= set(served.needs)

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
                routed = None
                if served.router is not None:
                    engine = Composer(self._model, ExpertPool(served.all_adapters), tokenizer=self._tokenizer)
                    served.router.require_engine(engine)
                    routed = engine, served.router
                else:
                    if self._engine is None:
                        self._engine = Composer(self._model, ExpertPool({key: served.all_adapters[key] for key in missing}))
                    elif key not in self._engine.pool.names:
                        self._engine.load(key, served.all_adapters[key])
                    self._engine.prefetch([key])
                with self._lock:
                    # from now on it may be unloaded
                    self._loaded[key] = Loaded(partial(self._size, served, key), time.monotonic(), routed)

    def take(self, served: Served) -> None:
        """Reserve the adapters or the router of a row until `give_back`, loading them if necessary.

        Raises what `load` raises; nothing is reserved then.
        """
        with self._lock:
            self._num_users.update(served.needs)
        if not self.has(served):
            try:
                self.load(served)
            except BaseException:
                self.give_back(served)
                raise

    def give_back(self, served: Served) -> None:
        """Release the adapters or the router of a row, and unload unused ones beyond the limit."""
        with self._lock:
            self._num_users.subtract(served.needs)
            self._num_users = +self._num_users
            self._active = None
            for key in served.needs:
                if key in self._loaded:
                    self._loaded[key].last_use = time.monotonic()
            for is_routed in (False, True):
                of_kind = [key for key, loaded in self._loaded.items() if (loaded.routed is not None) is is_routed]
                unused = [key for key in of_kind if not self._num_users[key]]
                for key in unused[: max(0, len(unused) - self._most)]:
                    self._drop(key)

    def activate(self, rows: Sequence[Served]) -> AbstractContextManager[Any]:
        """Return a context for one call of the model with one batch entry for each member of each row, under its mixture.

        If one row has a router, all rows must have the same.
        """
        if rows[0].router is not None:
            routed = self._loaded[rows[0].identity].routed
            assert routed is not None
            return routed[0].activate(routed[1])
        if self._engine is None:
            return nullcontext()
        if self._active is None or self._active[0] != rows:
            weights: list[Mapping[str, float]] = []
            contents: dict[str, float] = {}
            for served in rows:
                for member in served.members:
                    weights.append(member.weights)
                    contents |= member.weights
            self._active = rows, MixtureWeights.of(weights, tuple(contents))
        return self._engine.activate(self._active[1])

    def _drop(self, key: str) -> None:
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
