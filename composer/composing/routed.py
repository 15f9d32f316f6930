"""A way that routes: a router that was given, or one made for the pool, and trained on the examples if it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loraweave.composer.composer import Composer
from loraweave.composer.composing.choice import Choice
from loraweave.composer.composing.parts import Part
from loraweave.composer.composing.router_method import TRAINING, is_trained
from loraweave.composer.refine.routed import pool_of, router_name
from loraweave.composer.refine.tune import STEP_COST
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.routing.learned_router import LearnedRouter
from loraweave.routers.routing.make import router
from loraweave.routers.routing.token_router import TokenRouter
from loraweave.types import Router, Task

# without a budget
STEPS = 20
BATCH_SIZE = 8


@dataclass(frozen=True)
class Training:
    """How a router is trained on the examples that a part sees: so many steps of up to 8 of them."""

    steps: int
    lr: float | None
    seed: int
    checkpoint: Path | None

    @classmethod
    def of(cls, options: Mapping[str, Any], budget: int | None, seed: int, checkpoint: Path | None) -> Training:
        """`steps` are an option, or else what the budget of evaluations allows, a step counting as 3."""
        steps = STEPS if budget is None else max(1, budget // STEP_COST)
        return cls(options.get("steps", steps), options.get("lr"), seed, checkpoint)


class Routed:
    """The router itself, the same for all parts; one that is trained knows nothing of a part's held-out examples."""

    def __init__(
        self,
        method: str | Router,
        engine: Composer,
        task: Task,
        training: Training,
        options: Mapping[str, Any],
        on_progress: Callable[[int], object],
    ) -> None:
        self.name = router_name(method)
        self.learns = is_trained(method)
        self.evaluations = 0 if self.learns else 1
        self._engine = engine
        self._task = task
        self._training = training
        self._options = {name: value for name, value in options.items() if name not in TRAINING or not self.learns}
        self._on_progress = on_progress
        # what its options or the pool forbid is raised before anything runs
        self._router = self._made() if isinstance(method, str) else self._given(method)

    def planned(self, num_folds: int) -> int:
        """The evaluations to come."""
        return STEP_COST * self._training.steps * (num_folds + 1) if self.learns else 0

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        if not self.learns:
            return [self._choice(self._router)] * len(parts)
        return [self._choice(self._trained(part)) for part in parts]

    def _given(self, router: Router) -> Router:
        return router.onto(pool_of(router, self._engine)) if isinstance(router, TokenRouter) else router

    def _made(self) -> TokenRouter:
        with torch.random.fork_rng():
            torch.manual_seed(self._training.seed)
            return router(self.name, self._engine.bound_pool, **self._options)

    def _trained(self, part: Part) -> TokenRouter:
        made = self._made()
        assert isinstance(made, LearnedRouter)
        training = self._training
        made.fit(
            self._engine,
            replace(self._task, examples=[self._task.examples[place] for place in part.seen]),
            steps=training.steps,
            lr=training.lr,
            batch_size=min(BATCH_SIZE, len(part.seen)),
            seed=training.seed,
            warmup=0,
            checkpoint=None if training.checkpoint is None else training.checkpoint / f"{self.name}-{part.name}",
            progress=False,
        )
        made_evaluations = STEP_COST * training.steps
        self.evaluations += made_evaluations
        self._on_progress(made_evaluations)
        return made.eval()

    def _choice(self, made: Router) -> Choice:
        num_trained = sum(p.numel() for p in made.parameters()) if isinstance(made, LearnedRouter) and self.learns else 0
        return Choice(self._engine, MixtureWeights.of({}, self._engine.pool.names), num_trained=num_trained, router=made)
