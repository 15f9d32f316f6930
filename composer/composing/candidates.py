"""The experts that compose() chooses among: what retrieval finds in a hub, or the pool that was given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

from torch import nn

from loraweave.composer.fitting import misfit
from loraweave.errors import BaseModelMismatch, EmptyIndex, WeightingError
from loraweave.hub.base_key import base_key
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.hub.same_base import says_nothing
from loraweave.retrieval.retriever import Retriever
from loraweave.types import BaseKey, Candidate, Task

NUM_SHOWN = 5


def experts_of(given: Any) -> Hub | ExpertPool:
    """The hub or the pool; a list or a mapping of adapters as a pool. Raises WeightingError for anything else."""
    if isinstance(given, str | PathLike):
        raise WeightingError(f"adapters are chosen from a hub, and {str(given)!r} is its path: pass lw.Hub({str(given)!r})")
    return given if isinstance(given, Hub | ExpertPool) else ExpertPool(given)


def candidates(
    hub_or_pool: Hub | ExpertPool, task: Task, unlabelled: Sequence[str], k: int, model: nn.Module
) -> tuple[ExpertPool, dict[str, float]]:
    """The pool to search in, and the score of each adapter that was retrieved.

    Of a hub the `k` adapters that fit the task best among those that the model's weights or id speak for. Where its id tells
    nothing, or none is known to be for it, those count too that fit by the names and shapes of their layers.
    Raises EmptyIndex for an empty hub, BaseModelMismatch for one without an adapter for the model.
    """
    if isinstance(hub_or_pool, ExpertPool):
        return hub_or_pool, {}
    hub = hub_or_pool
    beside = _Beside(hub, dict(model.named_modules()))
    base = _base(hub, base_key(model), beside)
    inputs = [text for text, _ in task.examples] or list(unlabelled)
    retrieve = partial(Retriever(hub).for_task, inputs, description=task.instruction, base_model=base, evidence=False)
    scores = {hit.name: hit.score for hit in _hits(retrieve, k, base, beside)}
    if not scores:
        raise _nothing_for(hub, base, beside)
    return hub.pool(list(scores)), scores


class _Beside:
    """The hub's adapters beside the model's layers, each looked at once; `why` is the first that does not fit, and why."""

    def __init__(self, hub: Hub, modules: Mapping[str, nn.Module]) -> None:
        self._hub, self._modules = hub, modules
        self._known: dict[str, bool] = {}
        self.why = ""

    def fits(self, name: str) -> bool:
        if name not in self._known:
            why = misfit(self._modules, name, self._hub[name])
            self._known[name] = not why
            self.why = self.why or why
        return self._known[name]


def _base(hub: Hub, own: BaseKey, beside: _Beside) -> BaseKey:
    """The model's key, which holds for alike the hub's bases that only names and shapes speak for, where these count."""
    bases = [first for first, _ in hub.bases()]
    if not says_nothing(own.id) and any(not own.differs(first.base) for first in bases):
        return own
    open_to = [first for first in bases if own.differs(first.base) and not own.contradicts(first.base)]
    # adapters that name no base may be for several: each is looked at when it is found
    return replace(own, alike=tuple(first.base for first in open_to if not first.base_model or beside.fits(first.name)))


def _hits(retrieve: Callable[..., list[Candidate]], k: int, base: BaseKey, beside: _Beside) -> list[Candidate]:
    """The `k` best adapters, of which those of bases that are only alike fit the model's layers."""
    asked = k
    while True:
        hits = retrieve(k=asked)
        fitting = [hit for hit in hits if base.proves(hit.record.base) or beside.fits(hit.name)]
        if len(fitting) >= k or len(hits) < asked:
            return fitting[:k]
        asked *= 4


def _nothing_for(hub: Hub, base: BaseKey, beside: _Beside) -> BaseModelMismatch | EmptyIndex:
    """What is raised where the hub has no adapter for the model."""
    counts: Counter[str] = Counter()
    for first, number in hub.bases():
        counts[first.base_model] += number
    if not counts:
        return EmptyIndex(f"{hub} has no adapters to compose: hub.add(...) some, or method='base' is the model as it is")
    listed = ", ".join(
        f"{number} for {base_model or 'a base without a name'!r}" for base_model, number in counts.most_common(NUM_SHOWN)
    )
    more = f" and {len(counts) - NUM_SHOWN} other bases" if len(counts) > NUM_SHOWN else ""
    why = f" ({beside.why})" if beside.why else ""
    return BaseModelMismatch(
        f"none of the hub's {counts.total()} adapters is for this base model ({base.id!r}): it has {listed}{more}{why}. "
        "Load one of these (load_base(...), --base), or bind those that were made for this model to it (hub.bind(name, "
        "model), `loraweave hub bind`); method='base' is the model as it is"
    )
