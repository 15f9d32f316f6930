"""A way that searches: a solver of routers/ for each part of the examples, in step, so that they share forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from loraweave.composer.composing.choice import Choice
from loraweave.composer.composing.parts import Part
from loraweave.composer.example_loss import ExampleLoss, scored, scored_with_gradients
from loraweave.errors import SearchFailed
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.search.result import SearchResult
from loraweave.routers.search.solver import Solver
from loraweave.routers.search.told import Told


class Searched:
    """The best candidate of a solver, which sees a part's examples only; `checkpoint` is a folder with a file for each."""

    learns = True

    def __init__(
        self,
        name: str,
        solver: Callable[[Part], Solver],
        objective: ExampleLoss,
        *,
        checkpoint: Path | None,
        on_progress: Callable[[int], object],
    ) -> None:
        self.name = name
        self.evaluations = 0
        self._solver = solver
        self._objective = objective
        self._checkpoint = checkpoint
        self._on_progress = on_progress

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        searches = [self._search(part) for part in parts]
        while running := [(search, asked) for search in searches if (asked := search.solver.ask())]:
            for search, made in self._stepped(running):
                self.evaluations += made
                self._on_progress(made)
                search.keep()
        return [self._choice(search) for search in searches]

    def _stepped(self, running: Sequence[tuple[_Search, list[MixtureWeights]]]) -> list[tuple[_Search, int]]:
        """Tells each search what its candidates come to; they are all of one solver class."""
        pairs = [(search.objective, candidate) for search, asked in running for candidate in asked]
        if running[0][0].solver.needs_gradients:
            found = scored_with_gradients(pairs)
            losses, gradients = [loss for loss, _ in found], [gradient for _, gradient in found]
        else:
            losses, gradients = scored(pairs), None
        told, made = 0, []
        for search, asked in running:
            mine = slice(told, told + len(asked))
            search.tell(losses[mine], None if gradients is None else gradients[mine])
            made.append((search, search.solver.cost * len(asked)))
            told += len(asked)
        return made

    def _search(self, part: Part) -> _Search:
        log = None if self._checkpoint is None else self._checkpoint / f"{self.name}-{part.name}.json"
        search = _Search(self._solver(part), self._objective.view(part.seen), log)
        self.evaluations += search.solver.spent
        self._on_progress(search.solver.spent)
        return search

    def _choice(self, search: _Search) -> Choice:
        result = search.result()
        return Choice(
            self._objective.engine, result.mixture, self._objective.merge_method, result.num_trained, result.failed
        )


class _Search:
    """A solver with its objective, resumed from its checkpoint if there is one."""

    def __init__(self, solver: Solver, objective: ExampleLoss, log: Path | None) -> None:
        self.solver = solver
        self.objective = objective
        self._log = log
        if log is not None:
            solver.replay(Told.read(log, solver.settings()))

    def tell(self, losses: Sequence[float], gradients: Sequence[Tensor] | None) -> None:
        """Raises SearchFailed, with why the first candidate could not be scored, when none can be."""
        try:
            self.solver.tell(losses, gradients)
        except SearchFailed as error:
            raise self._explained(error) from error

    def result(self) -> SearchResult:
        """The best candidate; SearchFailed as above."""
        try:
            return self.solver.result()
        except SearchFailed as error:
            raise self._explained(error) from error

    def keep(self) -> None:
        """Writes the checkpoint."""
        if self._log is not None:
            self.solver.keep(self._log)

    def _explained(self, error: SearchFailed) -> SearchFailed:
        return SearchFailed(f"{error}. The first failed with {self.objective.failures.first}")
