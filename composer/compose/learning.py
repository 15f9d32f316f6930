"""The trials that learn from the examples: searches for weights, trainings, and the average of both.

In a search a solver asks for candidates, and the examples that it sees tell it their losses. Trainings are those of a LoRA,
new or begun as the hub's in-context adapter, under prompts that show the examples. Routers are in routed.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from loraweave.common.options import options_of
from loraweave.composer.compose.loss import ExampleLoss, Penalty, together, together_with_gradients
from loraweave.composer.compose.refine import (
    STEP_COST,
    Tuning,
    example_loss,
    linear_targets,
    num_scalars,
    targets_of,
    task_of,
    tuned_adapters,
)
from loraweave.composer.compose.settings import BEST, Settings, solver_class
from loraweave.composer.compose.trials import Bench, Choice, Fixed, Scores, Split, Trial, result_of
from loraweave.composer.merge.merge import parent_of
from loraweave.errors import SearchFailed, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.registry import get
from loraweave.routers.searches._solver import Solver, described
from loraweave.routers.searches._told import SearchResult, Told
from loraweave.routers.weights import MixtureWeights

if TYPE_CHECKING:
    from loraweave.composer.compose.user_loss import UserLoss

# trainings of a LoRA under demonstrations: of a new one, and of one that begins as the in-context adapter; chosen by
# leave-one-out on the example pool, with ORDERS orders of the demonstrations in the prompts
FEW_SHOT = Tuning(steps=10, lr=5e-4, batch_size=2)
BEGUN = Tuning(steps=6, lr=8e-4, batch_size=1)
# the share of a member of an average, where it is not 1; by leave-one-out, too
SHARES = {"few_shot": 3.0, "program": 3.0}
# how a LoRA is trained on many examples
LONG = Tuning(steps=80, lr=3e-3, batch_size=8)
ORDERS = 3

Start = Mapping[str, float] | MixtureWeights | None


def search_of(bench: Bench, settings: Settings) -> Trial:
    """Return the trial of the settings' search, or of the mixture that a formula has at once.

    Raises what the solver's settings raise, before the first forward pass.
    """
    start_name = settings.start_name(solver_class(settings.name))
    # a start that is found on examples is not known yet
    solver = solver_of(bench, settings, None if start_name else settings.options.get("start"))
    merge_method = settings.meaning or solver.merge_method
    if (groups := solver.space.groups) and merge_method != "linear":
        raise WeightingError(
            f"method {settings.name!r} is to weigh {len(groups)} groups of layers apart, but what its weights mean is "
            f"{merge_method!r}, which takes one weight for each adapter: leave out groups=, or pass space='deltas'"
        )
    if solver.learns:
        return Searched(bench, settings, solver, start_name)
    (mixture,) = solver.ask()
    return Fixed(settings.name, bench, mixture, merge_method)


def solver_of(bench: Bench, settings: Settings, start: Start) -> Solver:
    """Return a solver of the settings that begins at `start`; None is its own default."""
    supplied: dict[str, Any] = {
        "scores": bench.scores,
        "layers": list(bench.engine.target_layers),
        "weights": settings.weights,
        "start": start,
    }
    if "texts" in options_of(solver_class(settings.name)):
        from loraweave.routers.tokens._text import read_expert_texts

        prompts = [text for text, _ in bench.task.examples] or settings.inputs or ()
        supplied["texts"] = read_expert_texts(settings.name, bench.engine.pool, None, None)
        supplied["asked"] = [str(text) for text in prompts]
    return settings.solver(bench.names, supplied)


class Searched(Trial):
    """The best candidate of a solver; with a checkpoint, a folder, each split's search has a file of its own there.

    An objective of inputs without targets has nothing to hold out: its search sees all of them, whatever the split.
    """

    def __init__(self, bench: Bench, settings: Settings, solver: Solver, start_name: str | None) -> None:
        super().__init__(settings.name, bench)
        self.settings, self.solver, self._start_name = settings, solver, start_name
        self._loss = settings.objective or solver.loss
        # entropy looks at no targets
        self.learns = self._loss != "entropy"

    def planned(self, num_folds: int) -> int | None:
        return None if self.settings.budget is None else self.settings.budget * (num_folds + 1)

    def choose(self, splits: Sequence[Split]) -> list[Choice]:
        objective = self._objective()
        searches = [self._search(split, objective) for split in splits]
        while running := [(search, mixtures) for search in searches if (mixtures := search.solver.ask())]:
            objectives, candidates = [search.objective for search, _ in running], [mixtures for _, mixtures in running]
            if self.solver.needs_gradients:
                told = together_with_gradients(objectives, candidates)
            else:
                told = [(losses, []) for losses in together(objectives, candidates)]
            for (search, mixtures), (losses, gradients) in zip(running, told, strict=True):
                search.tell(losses, gradients)
                self._count(search.solver.cost * len(mixtures))
        return [self.bench.mixed(search.result(), objective.merge_method) for search in searches]

    def _search(self, split: Split, objective: ExampleLoss | UserLoss) -> _Search:
        folder = self.bench.checkpoint
        log = None if folder is None else folder / f"{self.name}-{split.name}.json"
        seen = split.seen if self.learns else range(len(objective.task.examples))
        search = _Search(solver_of(self.bench, self.settings, self._start(split)), objective.view(seen), log)
        self._count(search.solver.spent)
        return search

    def _start(self, split: Split) -> Start:
        """Return where the search of a split's examples begins; None for the solver's own default."""
        names, bench = self.bench.names, self.bench
        match self._start_name:
            case None:
                return self.settings.options.get("start")
            case "base":
                return {}
            case "uniform":
                return dict.fromkeys(names, 1 / len(names))
            case "retrieval":
                mixture: MixtureWeights = get("routers", "similarity")(names, scores=bench.scores).ask()[0]
                return mixture
        return bench.best(split.seen, BEST[self._start_name])

    def _objective(self) -> ExampleLoss | UserLoss:
        settings, bench = self.settings, self.bench
        merge_method = settings.meaning or self.solver.merge_method
        l1 = self.solver.l1 if settings.l1 is None else settings.l1
        terms = {"l1": l1, "l2": settings.l2, "sparsity": settings.sparsity}
        if self._loss == "cross_entropy" and merge_method == "linear" and bench.task.examples:
            return bench.loss().penalised(Penalty(**terms))
        from loraweave.composer.compose.user_loss import make_objective

        inputs = None if self.learns else settings.inputs
        if not self.learns and inputs is None:
            inputs = [text for text, _ in bench.task.examples]
        return make_objective(
            bench.engine,
            bench.tokenizer,
            bench.task,
            self._loss,
            merge_method=merge_method,
            inputs=inputs,
            workers=bench.workers,
            **terms,
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
        """Tell the solver losses, and write the checkpoint. Raises SearchFailed, saying why the first failed, if all did."""
        try:
            self.solver.tell(losses, gradients)
        except SearchFailed as error:
            raise self._explain_failure(error) from error
        if self._log is not None:
            self.solver.keep(self._log, self._kept)

    def result(self) -> SearchResult:
        """Return the best candidate. Raises SearchFailed as `tell` does."""
        try:
            return self.solver.result()
        except SearchFailed as error:
            raise self._explain_failure(error) from error

    def _explain_failure(self, error: SearchFailed) -> SearchFailed:
        return SearchFailed(f"{error}. The first failed with {self.objective.failures.first}")


class InContextAdapter(Trial):
    """The trial of the bench's `start` as it is, asked under the examples that a split sees."""

    learns = False
    steps = 0

    def __init__(self, bench: Bench, name: str = "in_context_adapter") -> None:
        super().__init__(name, bench)

    def choose(self, splits: Sequence[Split]) -> list[Choice]:
        assert self.bench.start is not None
        return [self.shown(self.bench.start, split) for split in splits]

    def shown(self, adapter: Adapter, split: Split) -> Choice:
        """Return the choice of an adapter; a prompt shows some of the split's examples (`in_turn`), but never its own."""
        bench = self.bench
        task = replace(bench.task, demonstrations=task_of(bench.task, split.seen).demonstrations)
        loss = example_loss(bench.engine.model, bench.tokenizer, task, ExpertPool({adapter.name: adapter}), turned=True)
        alone = MixtureWeights.of({adapter.name: 1.0}, [adapter.name])

        def scores(examples: Sequence[int]) -> Scores:
            losses_CN, hits_CN = loss.view(examples).scores([alone])
            return losses_CN[0], hits_CN[0]

        placed = loss.engine.pool[adapter.name]
        nothing = MixtureWeights.of({}, bench.names)
        return bench.choice(
            scores,
            result_of(nothing, num_scalars(placed) if self.steps else 0),
            task=task,
            stored=replace(placed, name="composition"),
            tuned_steps=self.steps,
            parents=[] if bench.start is None else [parent_of(bench.start)],
        )


class FewShot(InContextAdapter):
    """The trial of a LoRA on all linear layers, trained on a split's examples, each under the others (arXiv 2110.15943).

    It begins as the bench's `start`, or as a new adapter.
    """

    learns = True

    def __init__(self, bench: Bench, tuning: Tuning, name: str = "few_shot") -> None:
        super().__init__(bench, name)
        self._tuning = tuning
        self.steps = tuning.steps

    def planned(self, num_folds: int) -> int:
        return STEP_COST * self.steps * (num_folds + 1)

    @property
    def target_modules(self) -> Sequence[str]:
        """What the paths of the layers of a new adapter end in."""
        return linear_targets(self.bench.engine.model)

    def choose(self, splits: Sequence[Split]) -> list[Choice]:
        bench, names = self.bench, [split.name for split in splits]
        trained = tuned_adapters(
            bench.engine.model,
            bench.tokenizer,
            bench.task,
            dict.fromkeys(names, bench.start),
            {split.name: split.seen for split in splits},
            self._tuning,
            target_modules=self.target_modules,
            checkpoint=bench.checkpoint,
            progress=bench.progress,
        )
        made = STEP_COST * self.steps * len(splits)
        self.evaluations += made
        bench.on_progress(made)
        return [self.shown(trained[split.name], split) for split in splits]


class Lora(FewShot):
    """The trial of a new LoRA on the pool's layers, trained on the examples that a split sees, and asked without them."""

    def __init__(self, bench: Bench, tuning: Tuning) -> None:
        folder = None if bench.checkpoint is None else bench.checkpoint / "lora"
        super().__init__(replace(bench, start=None, checkpoint=folder), tuning, "lora")

    @property
    def target_modules(self) -> Sequence[str]:
        return targets_of(self.bench.engine.pool)


class Averaged(Trial):
    """The average of the probabilities of what other trials chose, each asked in its own prompts, by `SHARES`."""

    def __init__(self, parts: Sequence[Trial]) -> None:
        super().__init__("average", parts[0].bench)
        self._parts = parts

    def choose(self, splits: Sequence[Split]) -> list[Choice]:
        by_part = [part.choices_on(splits) for part in self._parts]
        return [self._average(choices) for choices in zip(*by_part, strict=True)]

    def finish(self) -> None:
        """Average the losses of the finished parts; answers to examples that were learned from are not looked at."""
        (self.chosen,) = self.choices_on([self.bench.everything])
        self.losses_N = self._averaged([part.losses_N for part in self._parts if part.losses_N is not None])

    def _average(self, choices: Sequence[Choice]) -> Choice:
        def scores(examples: Sequence[int]) -> Scores:
            _, hits_N = average.answers([self.bench.task.examples[place] for place in examples])
            return self._averaged([choice.scores(examples)[0] for choice in choices]), hits_N

        members = {
            part.name: replace(choice, fields={**choice.fields, "share": share})
            for part, choice, share in zip(self._parts, choices, self._shares, strict=True)
        }
        average = replace(self.bench.choice(scores), members=members)
        return average

    def _averaged(self, losses_by_part: Sequence[np.ndarray]) -> np.ndarray:
        mean_N: np.ndarray = np.average(losses_by_part, axis=0, weights=self._shares)
        return mean_N

    @property
    def _shares(self) -> list[float]:
        return [SHARES.get(part.name, 1.0) for part in self._parts]
