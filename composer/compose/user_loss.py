"""The objective by any function of the model, which is called with one candidate's mixture active at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from loraweave.common.chat import Prompt, prompt_json
from loraweave.composer.compose.loss import ExampleLoss, OnExamples
from loraweave.composer.compose.merged_candidates import active_candidate
from loraweave.composer.compose.scoring_workers import ScoringWorkers
from loraweave.composer.compose.settings import Examples
from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import untouched
from loraweave.errors import InvalidTask
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task


class UserLoss(OnExamples):
    """An objective: `function(model, examples)`, a number, lower is better, and the terms of ExampleLoss.

    `model` answers for the candidate, in evaluation mode and without gradients; `examples` are (input, target) pairs, an
    input of several turns being a `Conversation`. A candidate for which the function raises an error or gives no finite
    number has the loss NaN; `failures` counts these. Raises WeightingError for terms that cannot be used.
    """

    differentiable = False

    def __init__(
        self,
        engine: Composer,
        task: Task,
        function: Callable[[Any, Examples], float],
        *,
        merge_method: str = "linear",
        only: Sequence[int] | None = None,
        **terms: float,
    ) -> None:
        super().__init__(engine, task, merge_method, only, terms)
        self.function = function

    def describe(self) -> dict[str, Any]:
        """Return what the losses depend on; of the function itself the name alone."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return {
            "function": name,
            "instruction": self.task.instruction,
            "examples": [[prompt_json(prompt), target] for prompt, target in self._examples()],
            **self._describe_mixtures(),
        }

    def __call__(self, candidates: Sequence[MixtureWeights]) -> list[float]:
        return [self._loss(candidate) for candidate in candidates]

    def _examples(self) -> Examples:
        return [self.task.examples[index] for index in self.only]

    def _loss(self, candidate: MixtureWeights) -> float:
        try:
            with untouched(self.engine.model), torch.no_grad(), active_candidate(self.engine, candidate, self.merge_method):
                loss = float(self.function(self.engine.model, self._examples()))
        # an interruption is no Exception, and ends the search
        except Exception as error:
            self.failures.add_error(error)
            return math.nan
        if not math.isfinite(loss):
            self.failures.add(f"its loss is {loss}")
            return math.nan
        return loss + float(self.penalty(candidate.values_BTLE))


def make_objective(
    engine: Composer,
    tokenizer: Any,
    task: Task,
    loss: str | Callable[[Any, Examples], float],
    *,
    merge_method: str = "linear",
    inputs: Sequence[Prompt] | None = None,
    workers: ScoringWorkers | None = None,
    **terms: float,
) -> ExampleLoss | UserLoss:
    """Return an ExampleLoss of a kind of `names("objectives")`, or a UserLoss of `loss(model, examples)`.

    `terms` are those of `Penalty`. A function, which may close over anything, is called in this process, whatever `workers`
    there are. Raises what the objectives raise, UnknownName for an unknown kind, and InvalidTask for a
    function with `inputs`.
    """
    options: dict[str, Any] = {"merge_method": merge_method, **terms}
    if not callable(loss):
        return ExampleLoss(engine, tokenizer, task, kind=loss, inputs=inputs, workers=workers, **options)
    if inputs is not None:
        raise InvalidTask("a function as the objective is called with the task's examples; inputs are for 'entropy'")
    return UserLoss(engine, task, loss, **options)
