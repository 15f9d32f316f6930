"""A way that trains another way's choices on: the merged adapters of all parts in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.composing.choice import Choice, Way
from loraweave.composer.composing.parts import Part
from loraweave.composer.merge_by_layer import merge_mixture
from loraweave.composer.refine.tune import STEP_COST, Tuning, num_scalars, targets_of, tuned_adapters
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Task


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
