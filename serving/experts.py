"""The adapters that the engine has, by the hash of their content: what rows need comes, what none needs makes room."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.serving.served import Served


class Experts:
    """A Composer whose pool follows the rows. At most `most` adapters that no row uses stay, those used last.

    Names in the hub may come to mean other adapters; the hash of one's content does not, so a row keeps what it began with.
    One thread uses it.
    """

    def __init__(self, model: Any, most: int) -> None:
        self._model = model
        self._most = most
        self._engine: Composer | None = None
        self._num_users: Counter[str] = Counter()
        self._loaded: OrderedDict[str, None] = OrderedDict()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The hashes of the adapters that the engine has, the one used longest ago first."""
        return tuple(self._loaded)

    def take(self, served: Served) -> None:
        """Loads what a row's composition lacks, and keeps it until `give_back`.

        Raises BaseModelMismatch, LayerMismatch or AdapterUnsupported for an adapter that does not fit, WeightingError for a
        weight that fp32 does not hold; the row then needs none.
        """
        MixtureWeights.of([served.mixture], tuple(served.mixture))
        for content, adapter in served.adapters.items():
            if content not in self._loaded:
                if self._engine is None:
                    self._engine = Composer(self._model, ExpertPool({content: adapter}))
                else:
                    self._engine.load(content, adapter)
                self._loaded[content] = None
            self._loaded.move_to_end(content)
        self._num_users.update(served.adapters.keys())

    def give_back(self, served: Served) -> None:
        """Says that a row no longer needs its composition."""
        self._num_users.subtract(served.adapters.keys())
        self._num_users = +self._num_users
        unused = [content for content in self._loaded if not self._num_users[content]]
        for content in unused[: max(0, len(unused) - self._most)]:
            assert self._engine is not None
            self._engine.unload(content)
            del self._loaded[content]

    def activate(self, rows: Sequence[Served]) -> AbstractContextManager[Any]:
        """The mixture of each row of a batch, for a `with` block around the model's call."""
        if self._engine is None:
            return nullcontext()
        return self._engine.activate([served.mixture for served in rows])
