"""What a search is to minimise, by name or as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.composer.evaluation.penalty import LORAHUB_L1
from loraweave.composer.evaluation.user_loss import Examples, UserLoss
from loraweave.errors import InvalidTask
from loraweave.types import Task


def make_objective(
    engine: Composer,
    tokenizer: Any,
    task: Task,
    loss: str | Callable[[Any, Examples], float],
    *,
    merge_method: str = "linear",
    l1: float = LORAHUB_L1,
    l2: float = 0.0,
    sparsity: float = 0.0,
    inputs: Sequence[str] | None = None,
) -> ExampleLoss | UserLoss:
    """An ExampleLoss of a kind of `names("objectives")`, or a UserLoss of `loss(model, examples)`.

    Raises what these raise, UnknownName for a kind that there is not, and InvalidTask for `inputs` of a function.
    """
    if isinstance(loss, str):
        return ExampleLoss(
            engine,
            tokenizer,
            task,
            kind=loss,
            merge_method=merge_method,
            l1=l1,
            l2=l2,
            sparsity=sparsity,
            inputs=inputs,
        )
    if inputs is not None:
        raise InvalidTask("a function as the objective is called with the task's examples; inputs are for 'entropy'")
    return UserLoss(engine, task, loss, merge_method=merge_method, l1=l1, l2=l2, sparsity=sparsity)
