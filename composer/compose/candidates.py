"""The choice of a task's candidates from a hub or a pool, and of those whose descriptions match its instruction."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
from torch import nn

from loraweave.common.chat import Prompt
from loraweave.composer.live.fitting import misfit
from loraweave.errors import BaseModelMismatch, EmptyIndex, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_key, says_nothing
from loraweave.hub.embedders.form import Form
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.query import KeySpace
from loraweave.retrieval.retriever import Retriever
from loraweave.types import BaseKey, Candidate, Record, Task

NUM_SHOWN = 5
# the tag of an adapter that was trained to answer as the examples in a prompt do: where trainings under such prompts begin
IN_CONTEXT = "in-context"
# an adapter whose description has at least this cosine with the instruction is asked alone
KNOWN = 0.92
# two adapters answer one after the other where their cosine is at least LEAST, and by GAIN above that of the nearest one
LEAST, GAIN = 0.72, 0.01


def experts_of(experts: Any) -> Hub | ExpertPool:
    """Return a hub or a pool unchanged, and a list or mapping of adapters as a pool. Raises WeightingError otherwise."""
    match experts:
        case Hub() | ExpertPool():
            return experts
        case str() | PathLike():
            path = str(experts)
            raise WeightingError(f"adapters are chosen from a hub, and {path!r} is its path: pass lw.Hub({path!r})")
    return ExpertPool(experts)


def candidates(
    hub_or_pool: Hub | ExpertPool, task: Task, unlabelled: Sequence[Prompt], k: int, model: nn.Module
) -> tuple[ExpertPool, dict[str, float]]:
    """Return the pool to search in, and the score of each adapter that was retrieved.

    From a hub the pool has the `k` adapters that fit the task best among those whose base has the model's weights or id. If
    the id identifies no model, or no adapter is known to be for this one, adapters that fit by the names and shapes of their
    layers count too. Raises EmptyIndex for an empty hub, BaseModelMismatch for one without an adapter for the model.
    """
    if isinstance(hub_or_pool, ExpertPool):
        return hub_or_pool, {}
    inputs = [prompt for prompt, _ in task.examples] or unlabelled
    search = partial(Retriever.of(hub_or_pool).for_task, inputs, description=task.instruction, evidence=False)
    scores = {hit.name: hit.score for hit in fitting_hits(hub_or_pool, search, k, model)}
    return hub_or_pool.pool(list(scores)), scores


def fitting_hits(hub: Hub, search: Callable[..., list[Candidate]], k: int, model: nn.Module) -> list[Candidate]:
    """Return the `k` best hits of a search of the hub among the adapters for this model. Raises what `candidates` raises."""
    beside = _Beside(hub, dict(model.named_modules()))
    base, bases = base_key(model), [first for first, _ in hub.bases()]
    # where no base of the hub is known to be the model, those that match by names and shapes count
    if says_nothing(base.id) or all(base.differs(first.base) for first in bases):
        open_to = [first for first in bases if base.differs(first.base) and not base.contradicts(first.base)]
        # adapters that name no base may be for several: each is looked at when it is found
        alike = [first.base for first in open_to if not first.base_model or beside.fits(first.name)]
        base = replace(base, alike=tuple(alike))
    num_requested = k
    while True:
        hits = search(base_model=base, k=num_requested)
        # a hit whose base matches by names and shapes only must also fit the model's layers
        fitting = [hit for hit in hits if base.proves(hit.record.base) or beside.fits(hit.name)]
        # adapters that learned to read the examples in a prompt belong to no task
        experts = [hit for hit in fitting if IN_CONTEXT not in hit.record.tags] or fitting
        if len(experts) >= k or len(hits) < num_requested:
            break
        num_requested *= 4
    if not experts:
        raise _nothing_for(hub, base, beside)
    return experts[:k]


def in_context_adapter(hub_or_pool: Hub | ExpertPool, model: nn.Module) -> Adapter | None:
    """Return the hub's first adapter for the model that is tagged IN_CONTEXT; None without one, and for a pool."""
    if isinstance(hub_or_pool, ExpertPool):
        return None
    tagged = hub_or_pool.records(base_model=base_key(model), tags=IN_CONTEXT)
    return hub_or_pool[tagged[0].name] if tagged else None


@dataclass
class _Beside:
    """A cache that knows which adapters of a hub fit a model's layers; `why` is why the first misfit does not."""

    hub: Hub
    modules: Mapping[str, nn.Module]
    known: dict[str, bool] = field(default_factory=dict)
    why: str = ""

    def fits(self, name: str) -> bool:
        if name not in self.known:
            why = misfit(self.modules, name, self.hub[name])
            self.known[name] = not why
            self.why = self.why or why
        return self.known[name]


def _nothing_for(hub: Hub, base: BaseKey, beside: _Beside) -> BaseModelMismatch | EmptyIndex:
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


def skills(space: KeySpace, records: Sequence[Record], task: Task, texts: Sequence[str]) -> tuple[list[Record], str]:
    """Return the one or two adapters whose descriptions match the instruction, in the order they answer, and the reason.

    The list is empty if no description is near enough. `texts` are inputs of the task, which decide the order of two.
    """
    said_ND, asked_D = space.embed([record.description for record in records]), space.embed([task.instruction])[0]
    cosine_N = said_ND @ asked_D
    nearest = int(cosine_N.argmax())
    alone = f"{records[nearest].name} alone has {cosine_N[nearest]:.2f}"
    if cosine_N[nearest] >= KNOWN:
        return [records[nearest]], f"by the instruction: cosine with its description {cosine_N[nearest]:.2f}"
    # the cosine of the instruction with the sum of two descriptions
    length_NN = np.sqrt(np.maximum(2 + 2 * said_ND @ said_ND.T, 1e-9))
    cosine_NN = np.triu((cosine_N[:, None] + cosine_N) / length_NN, k=1)
    one, other = (records[int(place)] for place in np.unravel_index(cosine_NN.argmax(), cosine_NN.shape))
    best = cosine_NN.max()
    if task.labels is not None or best < max(LEAST, cosine_N[nearest] + GAIN):
        return [], f"by the instruction: no stored adapter is near enough to it to be taken for the skill ({alone})"
    pair = max([one, other], [other, one], key=lambda order: _flow(space, order, texts))
    return pair, f"by the instruction: cosine with both descriptions {best:.2f}, {alone}"


def _flow(space: KeySpace, order: Sequence[Record], texts: Sequence[str]) -> float:
    """Return the likeness of `texts` to the first adapter's inputs, plus that of its outputs to the second's inputs.

    Each is a cosine of meanings plus a cosine of forms, since the sentence encoder reads capitals as small letters.
    """
    first, second = order
    outputs = [answer for _, answer in space.pairs(first)]
    return sum(
        float(space.mean(embed(some)) @ space.mean(embed(others)))
        for some, others in ((texts, first.examples), (outputs, second.examples))
        for embed in (space.embed, Form().embed)
        if some and others
    )
