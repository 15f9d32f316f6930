"""What each expert of a mixture or of a router is worth: the rise of a loss when its weight is taken as 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraweave.common.rows import GivenRows
from loraweave.composer import scoring
from loraweave.composer.batches import EncodedRow
from loraweave.composer.mixing.resolve import resolve
from loraweave.composer.untouched import untouched
from loraweave.errors import CompositionError, ScopeError
from loraweave.hub.progress import tracked
from loraweave.routers.by_row import ByRow
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.routing.masked import masked
from loraweave.types import Router, Task

if TYPE_CHECKING:
    from loraweave.composer.composer import Composer


def leave_one_out(
    engine: Composer, task: Task | GivenRows, mixture: Any, *, renormalise: bool = False, progress: bool = False
) -> dict[str, float]:
    """{expert: rise of the mean loss of the task's examples without it}; what `Composer.leave_one_out` says."""
    if engine.tokenizer is None:
        raise CompositionError("leave_one_out() needs a tokenizer: make the Composer with tokenizer=...")
    router = resolve(mixture, engine.pool, engine.bound_pool)
    names, num_rows = engine.pool.names, 1
    if isinstance(router, MixtureWeights):
        names, num_rows = router.experts, router.values_BTLE.shape[0]
    elif isinstance(router, ByRow):
        num_rows = router.num_rows
    if num_rows != 1:
        raise ScopeError(f"leave_one_out() takes one mixture for all examples, but this one has {num_rows} rows")
    task = Task.of(task)
    rows = scoring.encoded(engine.model, engine.tokenizer, task, task.examples)
    whole = _mean_loss(engine, rows, router)
    places = tracked(range(len(names)), "leaving experts out", total=len(names), shown=progress)
    return {names[at]: _mean_loss(engine, rows, masked(router, at, renormalise=renormalise)) - whole for at in places}


def _mean_loss(engine: Composer, rows: Sequence[EncodedRow], router: Router) -> float:
    with untouched(engine.model), engine.activate(router):
        losses = scoring.losses_of_rows(engine.model, engine.tokenizer, rows)
    return sum(losses) / len(losses)
