"""Candidates of a search in the order of what they do for a few examples: the model is asked, not the descriptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loraweave.common.options import Count, check_options
from loraweave.common.rows import GivenRows
from loraweave.composer.compose.compose import experts_of
from loraweave.composer.compose.first_order import LossSlopes, first_order, update_norm
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.composer import Composer
from loraweave.errors import InvalidTask, SearchFailed, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.registry import nearest
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Candidate, Task

# score (higher is better) and evidence of every expert
_Ranking = dict[str, tuple[float, str]]

WAYS = ("first_order", "gradient_similarity", "probe")
PLACES = ("uniform", "base")


def rerank(
    model: Any,
    tokenizer: Any,
    hub_or_pool: Hub | ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    task: Task | GivenRows,
    candidates: Sequence[Candidate],
    *,
    by: str = "first_order",
    weight: float = 1.0,
    around: str = "uniform",
    batch_size: int = 8,
) -> list[Candidate]:
    """The candidates, best first by what they do on the task's examples; score and evidence say what that is.

    `by`: "first_order" scores by how much the loss would fall by `weight` more of the adapter if it went on as it begins
    (one backward pass for all candidates together), "gradient_similarity" by the same divided by the norm of the adapter's
    update (its cosine with the descent direction, times the gradient's norm, which all share), "probe" by how much the loss
    does fall with the adapter live at `weight` (a forward pass over the examples for each candidate).
    `around` is where the first two begin: at the "uniform" mixture of the candidates, whose weights sum to `weight`, or at
    the "base" model.

    Equal scores keep their order. The loss is the mean over the examples of the mean loss of their target tokens.
    Raises UnknownName, InvalidTask and WeightingError before anything is run; what Composer raises for an adapter that does
    not fit the model or has a trained head; SearchFailed where no score is finite.
    """
    asked = Task.of(task)
    for given, known, what, to in ((by, WAYS, "way", "by"), (around, PLACES, "place", "around")):
        if given not in known:
            hint = nearest(str(given), known)
            raise UnknownName(f"no {what} {given!r} to rerank {to}{hint}; there are {', '.join(known)}")
    if not asked.examples:
        raise InvalidTask("the task has no examples to rerank by; give at least one (input, target) pair")
    check_options("rerank()", {"weight": weight, "batch_size": batch_size}, {"weight": float, "batch_size": Count})
    if weight == 0:
        raise WeightingError(f"weight is {weight!r}; it must be a finite number other than 0")
    if not candidates:
        return []
    names = list(dict.fromkeys(candidate.name for candidate in candidates))
    experts = experts_of(hub_or_pool)
    pool = experts.subset(names) if isinstance(experts, ExpertPool) else experts.pool(names)
    engine = Composer(model, pool, tokenizer=tokenizer)
    if by == "probe":
        ranked = _by_probe(engine, tokenizer, asked, weight)
    else:
        mixture = {} if around == "base" else dict.fromkeys(names, weight / len(names))
        begun = first_order(engine, tokenizer, asked, mixture=mixture, batch_size=batch_size)
        start = f"loss {begun.loss:.3f} of the {'base model' if around == 'base' else 'uniform mixture'} begins to change by"
        ranked = _by_slope(begun.slopes, weight, start) if by == "first_order" else _by_cosine(engine, begun, weight, start)
    engine.close()
    if not any(math.isfinite(score) for score, _ in ranked.values()):
        raise SearchFailed(f"none of the {len(names)} candidates has a finite score by {by!r} on the examples")
    found = []
    for candidate in candidates:
        score, evidence = ranked[candidate.name]
        worst_if_broken = score if math.isfinite(score) else -math.inf
        found.append(replace(candidate, score=worst_if_broken, evidence=f"{evidence}; {candidate.evidence}"))
    return sorted(found, key=lambda candidate: -candidate.score)


def _by_slope(slopes: Mapping[str, float], weight: float, start: str) -> _Ranking:
    changes = {name: slope * weight for name, slope in slopes.items()}
    return {name: (-change, f"{start} {change:+.3f} at weight {weight:g}") for name, change in changes.items()}


def _by_cosine(engine: Composer, begun: LossSlopes, weight: float, start: str) -> _Ranking:
    ranking = {}
    for name, slope in begun.slopes.items():
        norm = update_norm(engine, name)
        # an update of norm zero points nowhere
        score = -slope * math.copysign(1.0, weight) / norm if norm else 0.0
        ranking[name] = (score, f"{start} {-score:+.4f} per unit of the update's norm")
    return ranking


def _by_probe(engine: Composer, tokenizer: Any, task: Task, weight: float) -> _Ranking:
    names = engine.pool.names
    objective = ExampleLoss(engine, tokenizer, task, l1=0.0)
    mixtures = [MixtureWeights.of(mixture, names) for mixture in ({}, *({name: weight} for name in names))]
    base, *losses = objective.scores(mixtures)[0].mean(axis=1).tolist()
    return {
        name: (base - loss, f"loss {base:.3f} becomes {loss:.3f} at weight {weight:g}")
        for name, loss in zip(names, losses, strict=True)
    }
