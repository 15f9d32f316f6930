"""Which searches method="auto" runs against each other, and what each of them may spend.

The budget counts all of it: an evaluation on part of the examples counts as that part. With F folds, whose searches see
(F - 1) / F of the examples each, a racer of b evaluations costs b (F - 1), and the winner another b on all examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraweave.composer.compose.refine import STEP_COST
from loraweave.errors import WeightingError

# evaluations of each racer: 8 steps of the gradient, the start and almost two generations of LoraHub
EACH = 16
# steps of training that follow the first racer where the budget allows it
TUNED_STEPS = 5
# in the order in which they are admitted
RACERS = ("gradient", "lorahub", "first_order")
LEAST = 2


@dataclass(frozen=True)
class Entry:
    """A search that is run: a solver, its options, and its limits."""

    method: str
    budget: int | None
    seconds: float | None
    options: Mapping[str, Any] = field(default_factory=dict)


def entries(racers: Sequence[str], budget: int | None, seconds: float | None, num_folds: int) -> list[Entry]:
    """Those of `racers` that the budget admits, the first in any case; equal shares of seconds. None of none.

    Raises WeightingError for a budget that is not enough for the first.
    """
    if not racers:
        return []
    if budget is None:
        share_s = None if seconds is None else seconds / (len(racers) + 1)
        return [Entry(method, None, share_s) for method in racers]
    if budget < LEAST * max(num_folds, 1):
        raise WeightingError(
            f"budget is {budget} evaluations, but method 'auto' with {num_folds} folds needs at least "
            f"{LEAST * max(num_folds, 1)}; raise the budget, or ask for fewer folds"
        )
    each = min(EACH, budget // num_folds) if num_folds else budget
    count = 1 if not num_folds else max(1, (budget - each) // (each * (num_folds - 1)))
    return [Entry(method, each, seconds) for method in racers[: min(count, len(racers))]]


def planned(entered: Sequence[Entry], steps: int, num_folds: int) -> int | None:
    """The evaluations to come, each candidate on however many examples counted whole: each fold's and a winner's on all.

    None where only time bounds them.
    """
    budgets = [entry.budget for entry in entered]
    if None in budgets:
        return None
    numbers = [budget or 0 for budget in budgets]
    final = max(numbers, default=0) if num_folds else sum(numbers)
    return num_folds * sum(numbers) + final + STEP_COST * steps * (num_folds + 1)


def tuned_steps(entered: Sequence[Entry], budget: int | None, num_folds: int) -> int:
    """How many steps of training may follow the first racer, with what the racers leave of the budget."""
    if budget is None or not num_folds or not entered:
        return 0
    each = entered[0].budget or 0
    left = budget - each - len(entered) * each * (num_folds - 1)
    return TUNED_STEPS if left >= STEP_COST * TUNED_STEPS * num_folds else 0
