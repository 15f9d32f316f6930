"""A search as a trial: a solver asks for candidates, the examples that it sees tell it their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loraweave.common.chat import Prompt
from loraweave.common.options import options_of
from loraweave.composer.compose.loss import ExampleLoss, Penalty, together, together_with_gradients
from loraweave.composer.compose.settings import BEST, Settings, solver_class
from loraweave.composer.compose.trials import Bench, Fixed, MixtureTrial, Split
from loraweave.composer.compose.user_loss import UserLoss, make_objective
from loraweave.errors import SearchFailed, WeightingError
from loraweave.routers.searches._solver import Solver, described
from loraweave.routers.searches._told import SearchResult, Told
from loraweave.routers.searches.similarity import Similarity
from loraweave.routers.tokens._text import read_expert_texts
from loraweave.routers.weights import MixtureWeights

Start = Mapping[str, float] | MixtureWeights | None


class Searched(MixtureTrial):
    """The best candidate of a solver; with a checkpoint, a folder, each split's search has a file of its own there.

    An objective of inputs without targets has nothing to hold out: its search sees all of them, whatever the split.
    Raises what the solver's settings raise, before the first forward pass.
    """

    def __init__(self, bench: Bench, settings: Settings) -> None:
        super().__init__(settings.name, bench)
        self.settings = settings
        self._start_name = settings.start_name(solver_class(settings.name))
        # of a start that is found on examples, nothing is known yet
        self._start_weights: Start = None if self._start_name else settings.options.get("start")
        self.solver = self._solver(self._start_weights)
        self.merge_method = settings.meaning or self.solver.merge_method
        self._loss = settings.objective or self.solver.loss
        self._inputs: Sequence[Prompt] | None = None
        if self._loss == "entropy":
            # which looks at no targets
            texts = [text for text, _ in bench.task.examples]
            self._inputs = texts if settings.inputs is None else settings.inputs
        self.learns = self._inputs is None
        if (groups := self.solver.space.groups) and self.merge_method != "linear":
            raise WeightingError(
                f"method {self.name!r} is to weigh {len(groups)} groups of layers apart, but what its weights mean is "
                f"{self.merge_method!r}, which takes one weight for each adapter: leave out groups=, or pass space='deltas'"
            )

    def as_fixed(self) -> Fixed:
        """What the solver gives at once, where no example has a part in it."""
        (mixture,) = self.solver.ask()
        return Fixed(self.name, self.bench, mixture, self.merge_method)

    def planned(self, num_folds: int) -> int | None:
        return None if self.settings.budget is None else self.settings.budget * (num_folds + 1)

    def choose(self, splits: Sequence[Split]) -> list[SearchResult]:
        objective = self._objective()
        searches = [self._search(split, objective) for split in splits]
        while running := [(search, asked) for search in searches if (asked := search.solver.ask())]:
            objectives, candidates = [search.objective for search, _ in running], [asked for _, asked in running]
            if self.solver.needs_gradients:
                told = together_with_gradients(objectives, candidates)
            else:
                told = [(losses, []) for losses in together(objectives, candidates)]
            for (search, asked), (losses, gradients) in zip(running, told, strict=True):
                search.tell(losses, gradients)
                self._count(search.solver.cost * len(asked))
        return [search.result() for search in searches]

    def _search(self, split: Split, objective: ExampleLoss | UserLoss) -> _Search:
        folder = self.bench.checkpoint
        log = None if folder is None else folder / f"{self.name}-{split.name}.json"
        seen = split.seen if self._inputs is None else range(len(self._inputs))
        search = _Search(self._solver(self._start(split)), objective.view(seen), log)
        self._count(search.solver.spent)
        return search

    def _start(self, split: Split) -> Start:
        """Where the search of a split's examples begins; None for the solver's own default."""
        names, given = self.bench.names, self._start_name
        if given is None:
            return self._start_weights
        if given == "uniform":
            return dict.fromkeys(names, 1 / len(names))
        if given == "retrieval":
            return Similarity(names, scores=self.bench.scores).ask()[0]
        return {} if given == "base" else self.bench.best(split.seen, BEST[given])

    def _solver(self, start: Start) -> Solver:
        supplied: dict[str, Any] = {
            "scores": self.bench.scores,
            "layers": list(self.bench.engine.target_layers),
            "weights": self.settings.weights,
            "start": start,
        }
        if "texts" in options_of(solver_class(self.settings.name)):
            asked = [text for text, _ in self.bench.task.examples] or self.settings.inputs or ()
            supplied["texts"] = read_expert_texts(self.name, self.bench.engine.pool, None, None)
            supplied["asked"] = [str(text) for text in asked]
        options = {name: value for name, value in self.settings.options.items() if name != "start"}
        return replace(self.settings, options=options).solver(self.bench.names, supplied)

    def _objective(self) -> ExampleLoss | UserLoss:
        settings, bench = self.settings, self.bench
        l1 = self.solver.l1 if settings.l1 is None else settings.l1
        terms = {"l1": l1, "l2": settings.l2, "sparsity": settings.sparsity}
        if self._loss == "cross_entropy" and self.merge_method == "linear" and bench.task.examples:
            return bench.loss().penalised(Penalty(**terms))
        engine, tokenizer, merge_method = bench.engine, bench.tokenizer, self.merge_method
        return make_objective(
            engine, tokenizer, bench.task, self._loss, merge_method=merge_method, inputs=self._inputs, **terms
        )

    def _count(self, made: int) -> None:
        self.evaluations += made
        self.bench.on_progress(made)


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
            raise self._explain_failure(error) from error
        if self._log is not None:
            self.solver.keep(self._log, self._kept)

    def result(self) -> SearchResult:
        """The best candidate; SearchFailed as above."""
        try:
            return self.solver.result()
        except SearchFailed as error:
            raise self._explain_failure(error) from error

    def _explain_failure(self, error: SearchFailed) -> SearchFailed:
        return SearchFailed(f"{error}. The first failed with {self.objective.failures.first}")
