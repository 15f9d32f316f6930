"""Candidates of a search in the order of what they do for a few examples: the model is asked, not the descriptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraweave.common.checks import is_number, require_whole
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


@dataclass(frozen=True)
class _RankOptions:
    """How to rank: at which weight, around which mixture, how many examples at once."""

    by: str
    weight: float
    around: str
    batch_size: int


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
    options = _RankOptions(by, weight, around, batch_size)
    _check(options, asked)
    if not candidates:
        return []
    names = list(dict.fromkeys(candidate.name for candidate in candidates))
    experts = experts_of(hub_or_pool)
    pool = experts.subset(names) if isinstance(experts, ExpertPool) else experts.pool(names)
    engine = Composer(model, pool, tokenizer=tokenizer)
    ranked = _WAYS[by](engine, tokenizer, asked, options)
    engine.close()
    if not any(math.isfinite(score) for score, _ in ranked.values()):
        raise SearchFailed(f"none of the {len(names)} candidates has a finite score by {by!r} on the examples")
    found = []
    for candidate in candidates:
        score, evidence = ranked[candidate.name]
        worst_if_broken = score if math.isfinite(score) else -math.inf
        found.append(replace(candidate, score=worst_if_broken, evidence=f"{evidence}; {candidate.evidence}"))
    return sorted(found, key=lambda candidate: -candidate.score)


def _by_first_order(engine: Composer, tokenizer: Any, task: Task, options: _RankOptions) -> _Ranking:
    found, weight = _slopes(engine, tokenizer, task, options), options.weight
    where = _where(found, options)
    return {
        name: (-slope * weight, f"{where} begins to change by {slope * weight:+.3f} at weight {weight:g}")
        for name, slope in found.slopes.items()
    }


def _by_gradient_similarity(engine: Composer, tokenizer: Any, task: Task, options: _RankOptions) -> _Ranking:
    found = _slopes(engine, tokenizer, task, options)
    where = _where(found, options)
    ranking = {}
    for name, slope in found.slopes.items():
        norm = update_norm(engine, name)
        # an update of norm zero points nowhere
        score = -slope * math.copysign(1.0, options.weight) / norm if norm else 0.0
        ranking[name] = (score, f"{where} begins to change by {-score:+.4f} per unit of the update's norm")
    return ranking


def _where(found: LossSlopes, options: _RankOptions) -> str:
    return f"loss {found.loss:.3f} of the {'base model' if options.around == 'base' else 'uniform mixture'}"


def _slopes(engine: Composer, tokenizer: Any, task: Task, options: _RankOptions) -> LossSlopes:
    names = engine.pool.names
    mixture = {} if options.around == "base" else dict.fromkeys(names, options.weight / len(names))
    return first_order(engine, tokenizer, task, mixture=mixture, batch_size=options.batch_size)


def _by_probe(engine: Composer, tokenizer: Any, task: Task, options: _RankOptions) -> _Ranking:
    names, weight = engine.pool.names, options.weight
    objective = ExampleLoss(engine, tokenizer, task, l1=0.0)
    mixtures = [MixtureWeights.of(mixture, names) for mixture in ({}, *({name: weight} for name in names))]
    base, *losses = objective.scores(mixtures)[0].mean(axis=1).tolist()
    return {
        name: (base - loss, f"loss {base:.3f} becomes {loss:.3f} at weight {weight:g}")
        for name, loss in zip(names, losses, strict=True)
    }


_WAYS: dict[str, Callable[[Composer, Any, Task, _RankOptions], _Ranking]] = {
    "first_order": _by_first_order,
    "gradient_similarity": _by_gradient_similarity,
    "probe": _by_probe,
}
_PLACES = ("uniform", "base")


def _check(options: _RankOptions, task: Task) -> None:
    for given, known, what in ((options.by, tuple(_WAYS), "way"), (options.around, _PLACES, "place")):
        if given not in known:
            hint = nearest(str(given), known)
            raise UnknownName(
                f"no {what} {given!r} to rerank {'by' if what == 'way' else 'around'}{hint}; there are {', '.join(known)}"
            )
    if not task.examples:
        raise InvalidTask("the task has no examples to rerank by; give at least one (input, target) pair")
    weight, batch_size = options.weight, options.batch_size
    if not is_number(weight) or weight == 0:
        raise WeightingError(f"weight is {weight!r}; it must be a finite number other than 0")
    require_whole("batch_size", batch_size, 1, WeightingError)
