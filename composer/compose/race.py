"""Which trials compose() runs: always the plain ones, and the method asked for or, for "auto", searches that race.

The budget of a race counts all of it: an evaluation on part of the examples counts as that part. With F folds, whose
searches see (F - 1) / F of the examples each, a racer of b evaluations costs b (F - 1), and the winner another b on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from loraweave.composer.compose.refine import STEP_COST, Tuning
from loraweave.composer.compose.searched import Searched
from loraweave.composer.compose.settings import OTHER_WAYS, Settings
from loraweave.composer.compose.trained import FEW_SHOT, FewShot, Routed, Tuned
from loraweave.composer.compose.trials import Bench, BestSingle, Fixed, Split, Trial
from loraweave.errors import SearchFailed, WeightingError
from loraweave.routers.weights import MixtureWeights

# evaluations of each racer: 8 steps of the gradient, the start and almost two generations of LoraHub
EACH = 16
# steps of training that follow the first racer where the budget allows it
TUNED_STEPS = 5
# in the order in which they are admitted
RACERS = ("gradient", "lorahub", "first_order")
LEAST = 2


class Race:
    """The trials of one task under one budget.

    Making it raises what settings and pool forbid, before anything runs, and then measures every adapter alone.
    """

    def __init__(self, bench: Bench, settings: Settings, folds: Sequence[Split]) -> None:
        self._bench = bench
        self._shown = bench.with_demonstrations()
        self._settings = settings
        self._folds = folds
        # why searches left the race
        self.left: list[str] = []
        # what is trained instead of searched
        self._trained: Routed | FewShot | None = Routed(bench, settings) if settings.routes else None
        if settings.method == "few_shot":
            self._trained = FewShot(self._shown, replace(FEW_SHOT, **settings.options, seed=settings.seed))
        self._searched = [] if settings.routes else self._make_searches()
        budgets = [search.settings.budget for search in self._searched]
        self._steps = tuned_steps(budgets, settings.budget, len(folds)) if self._trains_on() else 0
        # evaluations of the searches; a formula has none
        learning = [search.settings.budget for search in self._searched if search.solver.learns]
        self.planned = self._trained.planned(len(folds)) if self._trained else planned(learning, self._steps, len(folds))
        self._plain = self._plain_trials()

    def run(self) -> list[Trial[Any]]:
        """The trials, measured: base, best single and uniform mixture first. In a race only the best is run on all examples.

        A search none of whose candidates can be scored leaves the race; `left` then says why. Of a task without examples
        nothing plain is measured, since there is nothing to compare on.
        """
        for trial in self._plain:
            trial.run(self._folds)
        if self._settings.method == "auto":
            return [*self._plain, *self._run_race()]
        if self._settings.name in [trial.name for trial in self._plain] and self._trained is None:
            return self._plain
        asked = self._make_asked()
        asked.run(self._folds)
        return [*self._plain, asked]

    def _plain_trials(self) -> list[Trial[Any]]:
        """The base model, the best single adapter, and the uniform mixture, in the way it was asked for if it was."""
        bench = self._bench
        if not bench.task.examples:
            return []
        weights = dict.fromkeys(bench.names, 1 / len(bench.names))
        uniform = Fixed("uniform", bench, MixtureWeights.of(weights, bench.names))
        base = Fixed("base", bench, MixtureWeights.of({}, bench.names))
        return [base, BestSingle(bench), self._make_asked() if self._settings.method == "uniform" else uniform]

    def _make_asked(self) -> Trial[Any]:
        if self._trained is not None:
            return self._trained
        if self._settings.method == "in_context":
            return Fixed("in_context", self._shown, MixtureWeights.of({}, self._bench.names))
        (search,) = self._searched
        return search if search.solver.learns else search.as_fixed()

    def _run_race(self) -> list[Trial[Any]]:
        def measure(trial: Trial[Any]) -> None:
            (trial.hold_out if self._settings.folds else trial.run)(self._folds)

        searches = [search for search in self._searched if self._stays(search, measure)]
        raced: list[Trial[Any]] = [*searches]
        if self._steps and searches:
            tuned = Tuned(searches[0], Tuning(self._steps, seed=self._settings.seed))
            raced += [tuned] if self._stays(tuned, measure) else []
        while raced and not self._stays(best := min(raced, key=lambda trial: trial.held_out_loss), Trial.finish):
            raced.remove(best)
        return raced

    def _stays(self, trial: Trial[Any], measure: Callable[[Trial[Any]], None]) -> bool:
        try:
            measure(trial)
        except SearchFailed as error:
            self.left.append(f"{trial.name} left the race: {error}")
            return False
        return True

    def _make_searches(self) -> list[Searched]:
        settings, names = self._settings, self._bench.names
        alone = len(names) == 1
        if alone and settings.learns and settings.method not in ("auto", "grid"):
            raise WeightingError(
                f"method {settings.name!r} weighs adapters against each other, but there is only {names[0]!r}: "
                "take it as it is (method='best_single'), let method='grid' find its strength, or give more adapters"
            )
        if settings.method != "auto":
            return [] if settings.method in OTHER_WAYS else [Searched(self._bench, settings)]
        # of one adapter there is only with and without
        racers = [] if alone else [method for method in RACERS if settings.can_run(method)]
        return [
            Searched(self._bench, replace(settings, method=method, budget=budget, seconds=seconds, options={}))
            for method, budget, seconds in admit(racers, settings.budget, settings.seconds, len(self._folds))
        ]

    def _trains_on(self) -> bool:
        """Whether training may race too: not where an adapter is more than factors of linear layers."""
        if self._settings.method != "auto" or self._settings.merge_method not in (None, "linear"):
            return False
        return all(
            factors.kind == "linear" and factors.gain_O is None and factors.bias_O is None
            for adapter in self._bench.engine.bound_pool.adapters.values()
            for factors in adapter.layers.values()
        )


def admit(
    racers: Sequence[str], budget: int | None, seconds: float | None, num_folds: int
) -> list[tuple[str, int | None, float | None]]:
    """(method, budget, seconds) of those that the budget admits, the first in any case; equal shares of seconds.

    Raises WeightingError for a budget that is not enough for the first.
    """
    if not racers:
        return []
    if budget is None:
        share_s = None if seconds is None else seconds / (len(racers) + 1)
        return [(method, None, share_s) for method in racers]
    if budget < LEAST * max(num_folds, 1):
        raise WeightingError(
            f"budget is {budget} evaluations, but method 'auto' with {num_folds} folds needs at least "
            f"{LEAST * max(num_folds, 1)}; raise the budget, or ask for fewer folds"
        )
    each = min(EACH, budget // num_folds) if num_folds else budget
    count = 1 if not num_folds else max(1, (budget - each) // (each * (num_folds - 1)))
    return [(method, each, seconds) for method in racers[: min(count, len(racers))]]


def planned(budgets: Sequence[int | None], steps: int, num_folds: int) -> int | None:
    """How many evaluations will be made: those of each fold and of the winner on all. Each candidate counts as one.

    `budgets` are those of the searches; None where only time bounds one.
    """
    numbers = [budget for budget in budgets if budget is not None]
    if len(numbers) < len(budgets):
        return None
    final = max(numbers, default=0) if num_folds else sum(numbers)
    return num_folds * sum(numbers) + final + STEP_COST * steps * (num_folds + 1)


def tuned_steps(budgets: Sequence[int | None], budget: int | None, num_folds: int) -> int:
    """How many steps of training may follow the first racer, with what the racers leave of the budget."""
    if budget is None or not num_folds or not budgets:
        return 0
    each = budgets[0] or 0
    left = budget - each - len(budgets) * each * (num_folds - 1)
    return TUNED_STEPS if left >= STEP_COST * TUNED_STEPS * num_folds else 0
