"""A way that trains another way's choices on: the merged adapters of all parts in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loraweave.composer.compose.measurement import Choice, Part, Way
from loraweave.composer.compose.refine import (
    STEP_COST,
    Tuning,
    num_scalars,
    pool_of,
    targets_of,
    tuned_adapters,
)
from loraweave.composer.compose.settings import TRAINING, is_trained, router_name
from loraweave.composer.composer import Composer
from loraweave.composer.merge.merge import merge_mixture
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._saved import router
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router, Task


class Tuned:
    """A few steps of training from what `origin` chooses, on the examples that the part sees."""

    learns = True

    def __init__(
        self,
        origin: Way,
        tokenizer: Any,
        task: Task,
        tuning: Tuning,
        *,
        checkpoint: Path | None,
        on_progress: Callable[[int], object],
    ) -> None:
        self.name = f"{origin.name}+tuned"
        self.evaluations = 0
        self._origin = origin
        self._tokenizer = tokenizer
        self._task = task
        self._tuning = tuning
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._origins: dict[str, Choice] = {}

    def known(self, parts: Sequence[Part], choices: Sequence[Choice]) -> None:
        """Choices of the origin that were made already, so that they are not made again."""
        self._origins |= {part.name: choice for part, choice in zip(parts, choices, strict=True)}

    def choose(self, parts: Sequence[Part]) -> list[Choice]:
        if missing := [part for part in parts if part.name not in self._origins]:
            self.known(missing, self._origin.choose(missing))
        origins = [self._origins[part.name] for part in parts]
        model = origins[0].engine.model
        starts = {part.name: _merged(choice) for part, choice in zip(parts, origins, strict=True)}
        seen = {part.name: part.seen for part in parts}
        trained = tuned_adapters(
            model,
            self._tokenizer,
            self._task,
            starts,
            seen,
            self._tuning,
            target_modules=targets_of(origins[0].engine.pool),
            checkpoint=self._checkpoint,
        )
        made = STEP_COST * self._tuning.steps * len(parts)
        self.evaluations += made
        self._on_progress(made)
        engine = Composer(model, ExpertPool(trained), tokenizer=self._tokenizer)
        return [self._choice(engine, name, choice) for name, choice in zip(trained, origins, strict=True)]

    def _choice(self, engine: Composer, name: str, origin: Choice) -> Choice:
        adapter = engine.pool[name]
        return Choice(
            engine,
            MixtureWeights.of({name: 1.0}, engine.pool.names),
            num_trained=num_scalars(adapter),
            adapter=replace(adapter, name="composition"),
            origin=origin,
            tuned_steps=self._tuning.steps,
        )


def _merged(choice: Choice) -> Adapter | None:
    """The choice as one adapter; None where it is the base model."""
    if not bool(choice.mixture.values_BTLE.any()):
        return None
    # compose() has asked for the licenses before anything was measured
    return merge_mixture(choice.engine.pool, choice.mixture, method=choice.merge_method, name="start", allow_licenses=True)


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
