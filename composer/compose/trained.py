"""Trials that train: another trial's choice, merged into one adapter; and a router instead of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from loraweave.composer.compose.examples import EncodedExamples
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.objectives._row_sums import Kind
from loraweave.composer.compose.population import Job, row_sums
from loraweave.composer.compose.refine import (
    STEP_COST,
    Tuning,
    example_loss,
    linear_targets,
    num_scalars,
    pool_of,
    targets_of,
    tuned_adapters,
)
from loraweave.composer.compose.settings import TRAINING, Settings, router_name
from loraweave.composer.compose.trials import Bench, MixtureTrial, Split, Trial, result_of
from loraweave.composer.merge.merge import merge_mixture
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.registry import get
from loraweave.routers.searches._told import SearchResult
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._saved import router
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router


@dataclass(frozen=True, eq=False)
class _Continued:
    """A mixture that was trained on: to the expert `name` of the loss's engine."""

    begun: SearchResult
    name: str
    loss: ExampleLoss

    @property
    def adapter(self) -> Adapter:
        return self.loss.engine.pool[self.name]


class _TrainedTrial(Trial[_Continued]):
    """A trial whose choice is an adapter that was trained on what a split sees; all splits in one batch."""

    def __init__(self, name: str, bench: Bench, tuning: Tuning, merge_method: str = "linear") -> None:
        super().__init__(name, bench, merge_method)
        self._tuning = tuning

    def _train(
        self, splits: Sequence[Split], starts: Sequence[Adapter | None], target_modules: Sequence[str]
    ) -> dict[str, Adapter]:
        """{name of a split: its adapter}."""
        bench, names = self.bench, [split.name for split in splits]
        trained = tuned_adapters(
            bench.engine.model,
            bench.tokenizer,
            bench.task,
            dict(zip(names, starts, strict=True)),
            {split.name: split.seen for split in splits},
            self._tuning,
            target_modules=target_modules,
            checkpoint=bench.checkpoint,
        )
        made = STEP_COST * self._tuning.steps * len(splits)
        self.evaluations += made
        bench.on_progress(made)
        return trained

    def scores(self, chosen: _Continued, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        alone = MixtureWeights.of({chosen.name: 1.0}, chosen.loss.engine.pool.names)
        losses_CN, hits_CN = chosen.loss.view(examples).scores([alone])
        return losses_CN[0], hits_CN[0]

    def result(self, chosen: _Continued) -> SearchResult:
        return result_of(chosen.begun.mixture, num_scalars(chosen.adapter))

    def composition_fields(self, chosen: _Continued) -> dict[str, Any]:
        stored = replace(chosen.adapter, name="composition")
        return {**super().composition_fields(chosen), "stored": stored, "tuned_steps": self._tuning.steps}


class Tuned(_TrainedTrial):
    """A few steps of training from what `origin` chooses."""

    def __init__(self, origin: MixtureTrial, tuning: Tuning) -> None:
        super().__init__(f"{origin.name}+tuned", origin.bench, tuning, origin.merge_method)
        self._origin = origin

    def choose(self, splits: Sequence[Split]) -> list[_Continued]:
        begun, bench = self._origin.choices_on(splits), self.bench
        starts = [self._merge(result) for result in begun]
        trained = self._train(splits, starts, targets_of(bench.engine.pool))
        loss = example_loss(bench.engine.model, bench.tokenizer, bench.task, ExpertPool(trained))
        return [_Continued(result, name, loss) for name, result in zip(trained, begun, strict=True)]

    def _merge(self, result: SearchResult) -> Adapter | None:
        """The mixture as one adapter; None where it is the base model."""
        if not bool(result.mixture.values_BTLE.any()):
            return None
        # compose() has asked for the licenses before anything was measured
        pool = self.bench.engine.pool
        return merge_mixture(pool, result.mixture, method=self.merge_method, name="start", allow_licenses=True)


# steps and largest rate of a LoRA on the examples under demonstrations, chosen by leave-one-out on the example pool
FEW_SHOT = Tuning(steps=20, lr=5e-4, batch_size=2)


class FewShot(_TrainedTrial):
    """A LoRA on all linear layers, trained on the examples that a split sees, each under the others (arXiv 2110.15943)."""

    def __init__(self, bench: Bench, tuning: Tuning) -> None:
        super().__init__("few_shot", bench, tuning)

    def planned(self, num_folds: int) -> int:
        """How many evaluations will be made."""
        return STEP_COST * self._tuning.steps * (num_folds + 1)

    def choose(self, splits: Sequence[Split]) -> list[_Continued]:
        trained = self._train(splits, [None] * len(splits), linear_targets(self.bench.engine.model))
        nothing = result_of(MixtureWeights.of({}, self.bench.names))
        return [_Continued(nothing, split.name, self._loss(trained[split.name], split)) for split in splits]

    def _loss(self, adapter: Adapter, split: Split) -> ExampleLoss:
        """On all examples; a prompt shows those that the split sees, but never its own."""
        task = self.bench.task
        shown = replace(task, demonstrations=[task.examples[place] for place in split.seen])
        return example_loss(self.bench.engine.model, self.bench.tokenizer, shown, ExpertPool({adapter.name: adapter}))


# of a router's training, without a budget
STEPS = 20
BATCH_SIZE = 8


class Routed(Trial[Router]):
    """The router itself, the same for all splits; one that is trained sees a split's examples, up to 8 of them a step."""

    def __init__(self, bench: Bench, settings: Settings) -> None:
        method, options, budget = settings.method, settings.options, settings.budget
        super().__init__(router_name(method), bench)
        self.learns = settings.learns
        self.evaluations = 0 if self.learns else 1
        self._options = {name: value for name, value in options.items() if name not in TRAINING or not self.learns}
        # a step counts as 3 evaluations
        steps = STEPS if budget is None else max(1, budget // STEP_COST)
        self._steps, self._lr = options.get("steps", steps), options.get("lr")
        self._seed = settings.seed
        # what its options or the pool forbid is raised before anything runs
        self._router: Router
        match method:
            case str():
                self._router = self._new()
            case TokenRouter():
                self._router = method.onto(pool_of(method, bench.engine))
            case _:
                self._router = method

    def planned(self, num_folds: int) -> int:
        """How many evaluations will be made."""
        return STEP_COST * self._steps * (num_folds + 1) if self.learns else 0

    def choose(self, splits: Sequence[Split]) -> list[Router]:
        return [self._train(split) if self.learns else self._router for split in splits]

    def scores(self, chosen: Router, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        engine, needs = self.bench.engine, self._kind.needs | self._kind.hit_needs
        with engine.activate(chosen):
            (sums,) = row_sums(engine, self._examples, [Job(None, tuple(examples))], needs)
        return self._kind.losses(sums).double().numpy(), self._kind.hits(sums).numpy()

    def result(self, chosen: Router) -> SearchResult:
        count = sum(p.numel() for p in cast(LearnedRouter, chosen).parameters()) if self.learns else 0
        return result_of(MixtureWeights.of({}, self.bench.names), count)

    def composition_fields(self, chosen: Router) -> dict[str, Any]:
        return {**super().composition_fields(chosen), "router": chosen}

    @cached_property
    def _kind(self) -> Kind:
        kind: Kind = get("objectives", "cross_entropy")(self.bench.task)
        return kind

    @cached_property
    def _examples(self) -> EncodedExamples:
        """The examples, each in a row of its own: a router may look at the row as a whole."""
        return EncodedExamples(self.bench.engine.model, self.bench.tokenizer, self.bench.task, self._kind, trees=False)

    def _new(self) -> TokenRouter:
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            return router(self.name, self.bench.engine.bound_pool, **self._options)

    def _train(self, split: Split) -> TokenRouter:
        new, folder, task = cast(LearnedRouter, self._new()), self.bench.checkpoint, self.bench.task
        new.fit(
            self.bench.engine,
            replace(task, examples=[task.examples[place] for place in split.seen]),
            steps=self._steps,
            lr=self._lr,
            batch_size=min(BATCH_SIZE, len(split.seen)),
            seed=self._seed,
            warmup=0,
            checkpoint=None if folder is None else folder / f"{self.name}-{split.name}",
            progress=False,
        )
        self.evaluations += STEP_COST * self._steps
        self.bench.on_progress(STEP_COST * self._steps)
        return new.eval()
