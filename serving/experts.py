"""The engine's adapters, by the hash of their content: rows bring in what they need, and what none needs makes room."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.live.hook import hook_kinds
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.serving.served import Served


@dataclass
class _About:
    """The bytes of an adapter or of a router's adapters, and when it came or was last given back, by `time.monotonic`."""

    size: int
    last_use: float


class Experts:
    """A Composer whose pool follows the rows. At most `most` adapters that no row uses stay, those used last.

    Names in the hub may come to mean other adapters; the hash of one's content does not, so a row keeps what it began with.
    A router looks at its own adapters alone: it has a Composer of its own, which is kept with its composition.
    Any thread may `load`; the others are for the one that runs the model.
    """

    def __init__(self, model: Any, tokenizer: Any, most: int) -> None:
        self._itemsize = model.dtype.itemsize
        self._hooks = hook_kinds()
        self._model = model
        self._tokenizer = tokenizer
        self._most = most
        self._engine: Composer | None = None
        self._num_users: Counter[str] = Counter()
        self._loaded: OrderedDict[str, None] = OrderedDict()
        # of each that is there
        self._about: dict[str, _About] = {}
        self._routed: OrderedDict[str, tuple[Composer, Any]] = OrderedDict()
        self._loading = threading.Lock()
        self._lock = threading.Lock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The hashes of the adapters that the engine has, the one used longest ago first."""
        return tuple(self._loaded)

    @property
    def kept_bytes(self) -> int:
        """The bytes of the adapters that no row uses."""
        with self._lock:
            return sum(self._about[key].size for key in self._unused())

    @property
    def oldest(self) -> float:
        """The time of the last use of the unused adapter that was used longest ago; infinity where there is none."""
        with self._lock:
            return min((self._about[key].last_use for key in self._unused()), default=math.inf)

    def drop_oldest(self) -> None:
        """Drop the unused adapter that was used longest ago."""
        with self._loading, self._lock:
            self._drop(min(self._unused(), key=lambda key: self._about[key].last_use))

    def sizes(self, served: Served) -> dict[str, int]:
        """Return the bytes of what a composition needs in the engine, by content."""
        sizes = {content: self._itemsize * adapter.num_values for content, adapter in served.adapters.items()}
        if served.router is not None:
            return {served.identity: sum(sizes.values())}
        place = self._model.device, self._model.dtype
        for hook in self._hooks:
            sizes = {key: size + hook.bytes_beside(served.adapters[key], *place) for key, size in sizes.items()}
        return sizes

    def has(self, served: Served) -> bool:
        """Return whether everything that a composition needs is loaded."""
        with self._lock:
            return all(content in self._loaded or content in self._routed for content in _needs(served))

    def load(self, served: Served) -> None:
        """Load what a composition needs and the engine lacks, while others run.

        Raises BaseModelMismatch, LayerMismatch or AdapterUnsupported for an adapter that does not fit, WeightingError for a
        weight that fp32 does not hold.
        """
        with self._loading:
            if served.router is not None:
                self._load_routed(served)
                return
            for member in served.members:
                MixtureWeights.of([member.weights], tuple(member.weights))
            sizes = self.sizes(served)
            for content, adapter in served.adapters.items():
                if self._is_there(content, self._loaded):
                    continue
                if self._engine is None:
                    self._engine = Composer(self._model, ExpertPool({content: adapter}))
                else:
                    self._engine.load(content, adapter)
                self._engine.prefetch([content])
                with self._lock:
                    # from now on it may make room
                    self._loaded[content] = None
                    self._about[content] = _About(sizes[content], time.monotonic())

    def take(self, served: Served) -> None:
        """Keep what a row's composition needs until `give_back`, loading it if it is missing.

        Raises what `load` raises; the row then needs none.
        """
        with self._lock:
            self._num_users.update(_needs(served))
        if not self.has(served):
            try:
                self.load(served)
            except BaseException:
                self.give_back(served)
                raise

    def give_back(self, served: Served) -> None:
        """Note that a row no longer needs its composition."""
        with self._lock:
            self._num_users.subtract(_needs(served))
            self._num_users = +self._num_users
            for key in _needs(served):
                if key in self._about:
                    self._about[key].last_use = time.monotonic()
            for among in (self._loaded, self._routed):
                unused = [key for key in among if not self._num_users[key]]
                for key in unused[: max(0, len(unused) - self._most)]:
                    self._drop(key)

    def activate(self, rows: Sequence[Served]) -> AbstractContextManager[Any]:
        """Return a context for the model's call with the mixture of each member of each row, in this order.

        Where one has a router, all have the same.
        """
        if rows[0].router is not None:
            engine, router = self._routed[rows[0].identity]
            return engine.activate(router)
        if self._engine is None:
            return nullcontext()
        return self._engine.activate([member.weights for served in rows for member in served.members])

    def _unused(self) -> list[str]:
        return [key for key in (*self._loaded, *self._routed) if not self._num_users[key]]

    def _drop(self, key: str) -> None:
        if key in self._routed:
            self._routed.pop(key)[0].close()
        else:
            assert self._engine is not None
            del self._loaded[key]
            if self._loaded:
                self._engine.unload(key)
            else:
                # a pool has one at least
                self._engine.close()
                self._engine = None
        del self._about[key]

    def _load_routed(self, served: Served) -> None:
        if self._is_there(served.identity, self._routed):
            return
        assert served.router is not None
        engine = Composer(self._model, ExpertPool(served.members[0].adapters), tokenizer=self._tokenizer)
        served.router.require_engine(engine)
        with self._lock:
            self._routed[served.identity] = engine, served.router
            self._about[served.identity] = _About(self.sizes(served)[served.identity], time.monotonic())

    def _is_there(self, key: str, among: OrderedDict[str, Any]) -> bool:
        """Return whether a key is loaded; if so, make it the last to make room."""
        with self._lock:
            if key in among:
                among.move_to_end(key)
            return key in among


def _needs(served: Served) -> list[str]:
    """Return what rows of a composition keep in the engine: adapters by their content, or its router."""
    return [served.identity] if served.router is not None else list(served.adapters)
