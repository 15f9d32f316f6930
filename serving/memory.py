"""What a server holds beside its batch: the engine's adapters."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.live.hook import hook_kinds
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.serving.names import Served


@dataclass
class Loaded:
    """An adapter, or a router with a Composer of its own, that the engine has.

    `size` counts the bytes of its adapters, `last_use` is when it came or was last given back, by `time.monotonic`.
    """

    size: int
    last_use: float
    routed: tuple[Composer, TokenRouter] | None = None


class Experts:
    """A Composer whose pool follows the rows. At most `most` adapters that no row uses stay, those used last.

    Names in the hub may come to mean other adapters; the hash of one's content does not, so a row keeps what it began with.
    A router looks at its own adapters alone: it has a Composer of its own, which is kept with its composition.
    Any thread may `load`; the others are for the one that runs the model.
    """

    def __init__(self, model: Any, tokenizer: Any, most: int) -> None:
        self._hooks = hook_kinds()
        self._model = model
        self._tokenizer = tokenizer
        self._most = most
        self._engine: Composer | None = None
        self._num_users: Counter[str] = Counter()
        # by content, or a router by its composition's identity; the one loaded longest ago first
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        # the rows of the last call, and their weights
        self._active: tuple[Sequence[Served], MixtureWeights] | None = None
        self._loading = threading.Lock()
        self._lock = threading.Lock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The hashes of the adapters that the engine has, the one used longest ago first."""
        return tuple(key for key, loaded in self._loaded.items() if loaded.routed is None)

    def unused(self) -> dict[str, Loaded]:
        """Return what no row uses."""
        with self._lock:
            return {key: loaded for key, loaded in self._loaded.items() if not self._num_users[key]}

    def drop_oldest(self) -> None:
        """Drop what no row uses and was used longest ago."""
        unused = self.unused()
        with self._loading, self._lock:
            self._drop(min(unused, key=lambda key: unused[key].last_use))

    def sizes(self, served: Served) -> dict[str, int]:
        """Return the bytes of what a composition needs in the engine, by content."""
        itemsize = self._model.dtype.itemsize
        sizes = {content: itemsize * adapter.num_values for content, adapter in served.adapters.items()}
        if served.router is not None:
            return {served.identity: sum(sizes.values())}
        for hook in self._hooks:
            for key, adapter in served.adapters.items():
                sizes[key] += hook.bytes_beside(adapter, self._model.device, self._model.dtype)
        return sizes

    def has(self, served: Served) -> bool:
        """Return whether everything that a composition needs is loaded."""
        with self._lock:
            return self._loaded.keys() >= set(served.needs)

    def load(self, served: Served) -> None:
        """Load what a composition needs and the engine lacks, while others run.

        Raises BaseModelMismatch, LayerMismatch or AdapterUnsupported for an adapter that does not fit, WeightingError for a
        weight that fp32 does not hold.
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
                        # the last to make room
                        self._loaded.move_to_end(key)
            sizes = self.sizes(served) if missing else {}
            for key in missing:
                routed = None
                if served.router is not None:
                    engine = Composer(self._model, ExpertPool(served.adapters), tokenizer=self._tokenizer)
                    served.router.require_engine(engine)
                    routed = engine, served.router
                else:
                    if self._engine is None:
                        self._engine = Composer(self._model, ExpertPool({key: served.adapters[key] for key in missing}))
                    elif key not in self._engine.pool.names:
                        self._engine.load(key, served.adapters[key])
                    self._engine.prefetch([key])
                with self._lock:
                    # from now on it may make room
                    self._loaded[key] = Loaded(sizes[key], time.monotonic(), routed)

    def take(self, served: Served) -> None:
        """Keep what a row's composition needs until `give_back`, loading it if it is missing.

        Raises what `load` raises; the row then needs none.
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
        """Note that a row no longer needs its composition."""
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
        """Return a context for the model's call with the mixture of each member of each row, in this order.

        Where one has a router, all have the same.
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
            # a pool has one at least
            self._engine.close()
            self._engine = None
