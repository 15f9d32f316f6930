"""A composition after a change, with a row of its own in the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraweave.composer.composer import Composer
from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.composer.refine.routed import require_no_router
from loraweave.composer.report import ReportRow
from loraweave.errors import CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.mixture import MixtureWeights

if TYPE_CHECKING:
    from loraweave.composer.composition import Composition


def weighed_pool(composition: Composition, verb: str) -> tuple[ExpertPool, MixtureWeights]:
    """The experts that have a weight, and the mixture over them.

    Raises CompositionError for a composition without a pool, and for one that is more than its weights say.
    """
    require_no_router(composition.router, verb)
    if composition.stored is not None or composition.pool is None:
        raise CompositionError(
            f"cannot {verb} a composition that was read from a folder, cut or tuned: only the merged adapter is left of it. "
            "Do it before, on what compose() returned"
        )
    if composition.is_base:
        raise CompositionError(f"cannot {verb} this composition: it is the base model itself")
    pool = composition.pool.subset(composition.mean_weights)
    weights = composition.weights
    return pool, weights if isinstance(weights, MixtureWeights) else MixtureWeights.of(composition.mean_weights, pool.names)


def example_loss(composition: Composition, pool: ExpertPool, merge_method: str) -> ExampleLoss:
    """The loss on the composition's own examples, without terms for the weights."""
    engine = Composer(composition.model, pool, tokenizer=composition.tokenizer)
    return ExampleLoss(engine, composition.tokenizer, composition.task, merge_method=merge_method, l1=0.0)


def adapter_loss(composition: Composition, adapter: Adapter | None) -> float:
    """The mean loss of the composition's examples with an adapter, or with the base model alone."""
    if adapter is None:
        losses = composition.losses()
    else:
        objective = example_loss(composition, ExpertPool({adapter.name: adapter}), "linear")
        losses = objective.scores([MixtureWeights.of({adapter.name: 1.0}, [adapter.name])])[0][0].tolist()
    return sum(losses) / len(losses)


def renewed(
    composition: Composition,
    name: str,
    reason: str,
    *,
    loss: float,
    seconds: float,
    evaluations: int,
    weights: Mapping[str, float],
    by_layer: Mapping[str, Mapping[str, float]] | None,
    num_trained: int = 0,
    **fields: Any,
) -> Composition:
    """The composition with other `fields`, by `name` in its report; what it does on held-out examples is not known."""
    row = ReportRow(name, weights, loss, None, None, seconds, evaluations, by_layer, num_trained)
    old = composition.report
    kept = tuple(other for other in old.rows if other.name != name)
    report = replace(
        old,
        rows=(*kept, row),
        chosen=name,
        reason=reason,
        seconds=old.seconds + seconds,
        evaluations=old.evaluations + evaluations,
    )
    return replace(composition, all_weights=weights, by_layer=by_layer, report=report, **fields)
