"""The worth of each expert of a mixture or router: the rise of a loss when its weight is taken as 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from loraweave.common.display import tracked
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import untouched
from loraweave.errors import ScopeError
from loraweave.routers.combined import masked, num_rows_of
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router, Task

# opens a mixture in the model for the length of a block
Activate = Callable[[Any], AbstractContextManager[object]]


def leave_one_out(
    model: nn.Module,
    tokenizer: Any,
    activate: Activate,
    router: Router,
    names: Sequence[str],
    task: Task,
    *,
    renormalise: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Return {expert: rise of the mean loss of the task's examples, in nats, when its weight is 0}.

    `router` is resolved over the experts `names`. Raises ScopeError for a mixture of several rows.
    """
    names = router.experts if isinstance(router, MixtureWeights) else names
    num_rows = num_rows_of(router)
    if num_rows != 1:
        raise ScopeError(f"leave_one_out() takes one mixture for all examples, but this one has {num_rows} rows")
    rows = scoring.encode_pairs(model, tokenizer, task, task.examples)

    def mean_loss(mixture: Router) -> float:
        with untouched(model), activate(mixture):
            losses = scoring.losses_of_rows(model, tokenizer, rows)
        return sum(losses) / len(losses)

    whole = mean_loss(router)
    places = tracked(range(len(names)), "leaving experts out", total=len(names), shown=progress)
    return {names[at]: mean_loss(masked(router, at, renormalise=renormalise)) - whole for at in places}
