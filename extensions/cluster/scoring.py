"""The workers of a search: the state that each holds while candidates are scored, and the distribution of candidates.

A worker loads the base by its name and opens the adapters of a hub by theirs, once; each batch carries only the candidates
and a digest of the data to score on. Batches are those that one process would make, so that scores are the same to the bit
wherever they are computed.
"""

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Self, TypeVar

from loraweave import AdapterNotFound, Composer, CompositionError, Hub
from loraweave.extend import WorkersFailed, progress_bar, require_all
from loraweave.extend.live import Fitting
from loraweave.extend.models import BaseReference

Piece = TypeVar("Piece")
Made = TypeVar("Made")

# the number of tasks, and of their prompt forms, whose tokens a worker keeps
NUM_KEPT = 8


@dataclass(frozen=True)
class Parcel:
    """A value that is pickled once; a process that receives it again recognises it by its digest."""

    digest: str
    packed: bytes = field(compare=False, repr=False)

    @classmethod
    def of(cls, content: Any) -> Self:
        packed = pickle.dumps(content)
        return cls(hashlib.sha256(packed).hexdigest(), packed)

    def open(self) -> Any:
        return pickle.loads(self.packed)


class ScoringWorkers:
    """The workers of a search, each of which holds the engine's base and adapters, opened from the hub if there is one.

    Raises BaseModelMismatch for a base that has no folder or id to load it from, CompositionError for a lazy pool.
    """

    def __init__(self, crew: Any, engine: Composer, tokenizer: Any, hub: Hub | None) -> None:
        pool = engine.pool
        if pool.lazy:
            raise CompositionError(
                "the adapters of a lazy pool cannot be sent to workers: pass the hub itself, or n_jobs=1 to search in this "
                "process"
            )
        side = pool if hub is None else {name: adapter.hash for name, adapter in pool.adapters.items()}
        self._crew = crew
        self._engine = Parcel.of((BaseReference.of(engine.model, tokenizer), hub, side))

    def dealing(self, make: Callable[..., Any]) -> Callable[..., list[Any]]:
        """Return the function `deal` bound to the objective that `make` builds from an engine and a tokenizer."""
        return partial(self.deal, Parcel.of(make))

    def deal(self, objective: Parcel, work: Callable[[Any, Piece], Made], pieces: Sequence[Piece]) -> list[Made]:
        """Return work(objective, piece) for each piece, in order; workers build the objective from its parcel.

        Raises the error of the first piece that fails, WorkersFailed if workers are lost or cannot hold the model.
        """
        named = {f"{number} of {len(pieces)}": piece for number, piece in enumerate(pieces, start=1)}
        with progress_bar(False) as bar:
            call = partial(_carry_out, self._engine, objective, work)
            results = require_all(dict(self._crew.spread(call, named, label="scoring", bar=bar)))
        return [results[name] for name in named]


def _carry_out(engine: Parcel, objective: Parcel, work: Callable[[Any, Piece], Made], piece: Piece) -> Made:
    try:
        made = _objective(engine, objective)
    except Exception as error:
        raise WorkersFailed(f"a worker cannot hold what is searched ({type(error).__name__}: {error})") from error
    return work(made, piece)


@lru_cache(maxsize=NUM_KEPT)
def _objective(engine: Parcel, objective: Parcel) -> Any:
    return objective.open()(*_engine(engine))


@lru_cache(maxsize=1)
def _engine(parcel: Parcel) -> tuple[Composer, Any]:
    """Return the Composer and tokenizer for a packed (base, hub, {name: hash}), or (base, None, pool)."""
    # cached objectives would keep the base of another engine in memory
    _objective.cache_clear()
    base, hub, side = parcel.open()
    model, tokenizer = base.load()
    pool = side if hub is None else hub.pool(side)
    for name, adapter in pool.adapters.items() if hub is not None else ():
        if adapter.hash != side[name]:
            raise AdapterNotFound(f"adapter {name!r} of {hub} was replaced while the search ran; search again")
    return Composer(model, Fitting(model).accepted(pool), tokenizer=tokenizer), tokenizer
