"""A way that searches: a solver of routers/ for each part of the examples, in step, so that they share forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from loraweave.composer.composing.choice import Choice
from loraweave.composer.composing.parts import Part
from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.composer.evaluation.lockstep import together, together_with_gradients
from loraweave.composer.evaluation.user_loss import UserLoss
from loraweave.errors import SearchFailed
from loraweave.routers.objective import described
from loraweave.routers.search.result import SearchResult
from loraweave.routers.search.solver import Solver
from loraweave.routers.search.told import Told


class Searched:
    """The best candidate of a solver, which sees a part's examples only; `checkpoint` is a folder with a file for each.

    With `num_inputs`, the objective is of so many inputs without targets: a search sees all of them, whatever the part.
    """

    def __init__(
        self,
        name: str,
        solver: Callable[[Part], Solver],
        objective: ExampleLoss | UserLoss,
        *,
        checkpoint: Path | None,
        on_progress: Callable[[int], object],
        num_inputs: int | None = None,
    ) -> None:
        self.name = name
        # without targets there is nothing to hold out
        self.learns = num_inputs is None
        self.evaluations = 0
        self._solver = solver
        self._objective = objective
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._num_inputs = num_inputs

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        searches = [self._search(part) for part in parts]
        while running := [(search, asked) for search in searches if (asked := search.solver.ask())]:
            objectives, candidates = [search.objective for search, _ in running], [asked for _, asked in running]
            if searches[0].solver.needs_gradients:
                told = together_with_gradients(objectives, candidates)
            else:
                told = [(losses, []) for losses in together(objectives, candidates)]
            for (search, asked), (losses, gradients) in zip(running, told, strict=True):
                search.tell(losses, gradients)
                made = search.solver.cost * len(asked)
                self.evaluations += made
                self._on_progress(made)
        return [self._choice(search) for search in searches]

    def _search(self, part: Part) -> _Search:
        log = None if self._checkpoint is None else self._checkpoint / f"{self.name}-{part.name}.json"
        seen = part.seen if self._num_inputs is None else range(self._num_inputs)
        search = _Search(self._solver(part), self._objective.view(seen), log)
        self.evaluations += search.solver.spent
        self._on_progress(search.solver.spent)
        return search

    def _choice(self, search: _Search) -> Choice:
        result = search.result()
        return Choice(
            self._objective.engine,
            result.mixture,
            self._objective.merge_method,
            result.num_trained,
            result.failed,
            result.losses,
        )


class _Search:
    """A solver with its objective, resumed from its checkpoint if there is one."""

    def __init__(self, solver: Solver, objective: ExampleLoss | UserLoss, log: Path | None) -> None:
        self.solver = solver
        self.objective = objective
        self._log = log
        self._kept = {} if log is None else {**solver.settings(), **described(objective)}
        if log is not None:
            solver.replay(Told.read(log, self._kept))

    def tell(self, losses: Sequence[float], gradients: Sequence[Tensor]) -> None:
        """Also writes the checkpoint. SearchFailed, with why the first candidate could not be scored, when none can be."""
        try:
            self.solver.tell(losses, gradients)
        except SearchFailed as error:
            raise self._explained(error) from error
        if self._log is not None:
            self.solver.keep(self._log, self._kept)

    def result(self) -> SearchResult:
        """The best candidate; SearchFailed as above."""
        try:
            return self.solver.result()
        except SearchFailed as error:
            raise self._explained(error) from error

    def _explained(self, error: SearchFailed) -> SearchFailed:
        return SearchFailed(f"{error}. The first failed with {self.objective.failures.first}")
