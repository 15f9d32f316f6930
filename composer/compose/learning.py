"""The trials that learn from the examples: searches for weights, trainings, and the average of both.

In a search a solver asks for candidates, and the examples that it sees tell it their losses. Trainings are those of a LoRA,
new or begun as the hub's in-context adapter, under prompts that show the examples. Routers are in routed.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

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
from loraweave.composer.compose.trials import Bench, Fixed, Scores, Selection, Split, Trial, result_of
from loraweave.composer.composer import Composer
from loraweave.composer.merge.merge import parent_of
from loraweave.errors import SearchFailed, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.registry import get
from loraweave.routers.searches._solver import Solver, described
from loraweave.routers.searches._told import Told
from loraweave.routers.weights import MixtureWeights

if TYPE_CHECKING:
    from loraweave.composer.compose.user_loss import UserLoss

    Objective = ExampleLoss | UserLoss

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

    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        objective = self._objective()
        searches = [self._begun(split, objective) for split in splits]
        while running := [(*search, mixtures) for search in searches if (mixtures := search[0].ask())]:
            objectives, candidates = [view for _, view, _, _ in running], [mixtures for *_, mixtures in running]
            if self.solver.needs_gradients:
                told = together_with_gradients(objectives, candidates)
            else:
                told = [(losses, []) for losses in together(objectives, candidates)]
            for (solver, view, keep, mixtures), (losses, gradients) in zip(running, told, strict=True):
                with _explained(view):
                    solver.tell(losses, gradients)
                if keep is not None:
                    keep()
                self.count(solver.cost * len(mixtures))
        choices = []
        for solver, view, _ in searches:
            with _explained(view):
                choices.append(self.bench.mixed(solver.result(), view.merge_method))
        return choices

    def _begun(self, split: Split, objective: Objective) -> tuple[Solver, Objective, partial[None] | None]:
        """Return a split's solver, resumed from its checkpoint if there is one, its objective, and what keeps it there."""
        solver = solver_of(self.bench, self.settings, self._start(split))
        view = objective.view(split.seen if self.learns else range(len(objective.task.examples)))
        keep = None
        if self.bench.checkpoint is not None:
            log, kept = self.bench.checkpoint / f"{self.name}-{split.name}.json", {**solver.settings(), **described(view)}
            solver.replay(Told.read(log, kept))
            keep = partial(solver.keep, log, kept)
        self.count(solver.spent)
        return solver, view, keep

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

    def _objective(self) -> Objective:
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


@contextmanager
def _explained(objective: Objective) -> Iterator[None]:
    """Let SearchFailed say why the first candidate could not be scored."""
    try:
        yield
    except SearchFailed as error:
        raise SearchFailed(f"{error}. The first failed with {objective.failures.first}") from error


def shown(bench: Bench, adapter: Adapter, split: Split, steps: int = 0) -> Selection:
    """Return the choice of an adapter, trained for `steps` steps; prompts show some of a split's examples (`in_turn`).

    No prompt shows the example that it asks for.
    """
    task = replace(bench.task, demonstrations=task_of(bench.task, split.seen).demonstrations)
    loss = example_loss(bench.engine.model, bench.tokenizer, task, ExpertPool({adapter.name: adapter}), turned=True)
    placed = loss.engine.pool[adapter.name]
    return bench.selection(
        partial(loss.scores_on, MixtureWeights.of({adapter.name: 1.0}, [adapter.name])),
        result_of(MixtureWeights.of({}, bench.names), num_scalars(placed) if steps else 0),
        task=task,
        stored=replace(placed, name="composition"),
        tuned_steps=steps,
        parents=[] if bench.start is None else [parent_of(bench.start)],
    )


class InContextAdapter(Trial):
    """The trial of the bench's `start` as it is, asked under the examples that a split sees."""

    learns = False

    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        assert self.bench.start is not None
        return [shown(self.bench, self.bench.start, split) for split in splits]


class FewShot(Trial):
    """The trial of a LoRA that is trained on a split's examples; it begins as the bench's `start`, or as a new adapter.

    Under demonstrations each example is learned under the others (arXiv 2110.15943). For an engine,
    `targets` returns the endings of the paths of the layers that a new adapter gets.
    """

    def __init__(self, name: str, bench: Bench, tuning: Tuning, targets: Callable[[Composer], Sequence[str]]) -> None:
        super().__init__(name, bench)
        self._tuning, self._targets = tuning, targets

    def planned(self, num_folds: int) -> int:
        return STEP_COST * self._tuning.steps * (num_folds + 1)

    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        bench, names = self.bench, [split.name for split in splits]
        trained = tuned_adapters(
            bench.engine.model,
            bench.tokenizer,
            bench.task,
            dict.fromkeys(names, bench.start),
            {split.name: split.seen for split in splits},
            self._tuning,
            target_modules=self._targets(bench.engine),
            checkpoint=bench.checkpoint,
            progress=bench.progress,
        )
        self.count(self.planned(len(splits) - 1))
        return [shown(bench, trained[split.name], split, self._tuning.steps) for split in splits]


def few_shot(bench: Bench, settings: Settings) -> Trial:
    """Return the trial of a LoRA on all linear layers, trained under demonstrations by the settings' options and seed."""
    tuning = FEW_SHOT if bench.start is None else BEGUN
    options = settings.options if settings.method == "few_shot" else {}
    tuning = replace(tuning, **options, seed=settings.seed)
    return FewShot("few_shot", bench.with_demonstrations(ORDERS), tuning, lambda engine: linear_targets(engine.model))


def long_lora(bench: Bench, settings: Settings) -> Trial:
    """Return the trial of a new LoRA on the pool's layers, trained for long, and asked without demonstrations."""
    folder = None if bench.checkpoint is None else bench.checkpoint / "lora"
    bench = replace(bench, start=None, checkpoint=folder)
    return FewShot("lora", bench, replace(LONG, seed=settings.seed), lambda engine: targets_of(engine.pool))


class Averaged(Trial):
    """The average of the probabilities of what other trials chose, each asked in its own prompts, by `SHARES`."""

    def __init__(self, parts: Sequence[Trial]) -> None:
        super().__init__("average", parts[0].bench)
        self._parts = parts

    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        by_part = [part.choices_on(splits) for part in self._parts]
        return [self._average(choices) for choices in zip(*by_part, strict=True)]

    def finish(self) -> None:
        """Average the losses of the finished parts; answers to examples that were learned from are not looked at."""
        (self.chosen,) = self.choices_on([self.bench.everything])
        self.losses_N = self._averaged([part.losses_N for part in self._parts if part.losses_N is not None])

    def _average(self, choices: Sequence[Selection]) -> Selection:
        def scores(examples: Sequence[int]) -> Scores:
            _, hits_N = average.answers([self.bench.task.examples[place] for place in examples])
            return self._averaged([choice.scores(examples)[0] for choice in choices]), hits_N

        members = {
            part.name: replace(choice, fields={**choice.fields, "share": share})
            for part, choice, share in zip(self._parts, choices, self._shares, strict=True)
        }
        average = replace(self.bench.selection(scores), members=members)
        return average

    def _averaged(self, losses_by_part: Sequence[np.ndarray]) -> np.ndarray:
        mean_N: np.ndarray = np.average(losses_by_part, axis=0, weights=self._shares)
        return mean_N

    @property
    def _shares(self) -> list[float]:
        return [SHARES.get(part.name, 1.0) for part in self._parts]
