"""The trial of a router, which weighs the adapters for every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch

from loraweave.composer.compose.examples import EncodedExamples
from loraweave.composer.compose.objectives._row_sums import Kind
from loraweave.composer.compose.population import Job, row_sums
from loraweave.composer.compose.refine import STEP_COST, pool_of
from loraweave.composer.compose.settings import TRAINING, Settings
from loraweave.composer.compose.trials import Bench, Scores, Selection, Split, Trial, result_of
from loraweave.registry import get
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._saved import router
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router

# the steps of a router's training without a budget
STEPS = 20
BATCH_SIZE = 8


def routed(bench: Bench, settings: Settings) -> Routed:
    """Return the trial of the settings' router. What its options or the pool forbid is raised before anything runs."""
    match settings.method:
        case str():
            return Routed(bench, settings, new_router(bench, settings))
        case TokenRouter() as made:
            return Routed(bench, settings, made.onto(pool_of(made, bench.engine)))
    return Routed(bench, settings, settings.method)


def new_router(bench: Bench, settings: Settings) -> TokenRouter:
    """Return the router of the settings' name and options, drawn by their seed."""
    known = settings.options.items()
    options = {name: value for name, value in known if name not in TRAINING or not settings.learns}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return router(settings.name, bench.engine.bound_pool, **options)


class Routed(Trial):
    """The trial of a router, the same for all splits; a trained one sees a split's examples, up to 8 of them a step."""

    def __init__(self, bench: Bench, settings: Settings, made: Router) -> None:
        super().__init__(settings.name, bench)
        self.learns = settings.learns
        self.evaluations = 0 if self.learns else 1
        self._settings, self._router = settings, made

    def planned(self, num_folds: int) -> int:
        return STEP_COST * self._steps * (num_folds + 1) if self.learns else 0

    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        return [self._choice(self._train(split) if self.learns else self._router) for split in splits]

    def _choice(self, made: Router) -> Selection:
        engine, needs = self.bench.engine, self._kind.needs | self._kind.hit_needs

        def scores(examples: Sequence[int]) -> Scores:
            with engine.activate(made):
                (sums,) = row_sums(engine, self._examples, [Job.of(None, examples)], needs)
            return self._kind.losses(sums).double().numpy(), self._kind.hits(sums).numpy()

        count = sum(p.numel() for p in cast(LearnedRouter, made).parameters()) if self.learns else 0
        return self.bench.selection(scores, result_of(MixtureWeights.of({}, self.bench.names), count), router=made)

    @cached_property
    def _kind(self) -> Kind:
        kind: Kind = get("objectives", "cross_entropy")(self.bench.task)
        return kind

    @cached_property
    def _examples(self) -> EncodedExamples:
        """The examples, each in a row of its own: a router may look at the row as a whole."""
        return EncodedExamples(self.bench.engine.model, self.bench.tokenizer, self.bench.task, self._kind, trees=False)

    @property
    def _steps(self) -> int:
        """The steps of a training, which count as 3 evaluations each."""
        budget = self._settings.budget
        steps: int = self._settings.options.get("steps", STEPS if budget is None else max(1, budget // STEP_COST))
        return steps

    def _train(self, split: Split) -> TokenRouter:
        bench, settings = self.bench, self._settings
        learned, folder = cast(LearnedRouter, new_router(bench, settings)), bench.checkpoint
        learned.fit(
            bench.engine,
            replace(bench.task, examples=[bench.task.examples[place] for place in split.seen]),
            steps=self._steps,
            lr=settings.options.get("lr"),
            batch_size=min(BATCH_SIZE, len(split.seen)),
            seed=settings.seed,
            warmup=0,
            checkpoint=None if folder is None else folder / f"{self.name}-{split.name}",
            progress=False,
        )
        self.count(STEP_COST * self._steps)
        return learned.eval()
