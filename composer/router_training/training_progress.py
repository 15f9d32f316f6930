"""A training on its way: its optimiser, its report, and the best and the last good that its parameters have been."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.router_training.kept_state import KeptState
from loraweave.composer.router_training.settings import TrainingSettings
from loraweave.composer.training.best import Best, copied, put
from loraweave.errors import TrainingError, WeightingError
from loraweave.routers.routing.training_report import TrainingReport


class TrainingProgress:
    """What the steps of a router and of a model of experts have in common, whoever takes them.

    It goes on from what `state` has kept: `first` steps were taken before, and `recent` is the load of the last ones.
    `learner` ("router 'arrow'") and `owner` ("router"), which has the parameters, are for messages.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        settings: TrainingSettings,
        experts: tuple[str, ...],
        state: KeptState,
        *,
        learner: str,
        owner: str,
    ) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.highest_rate, weight_decay=settings.weight_decay)
        self.report = TrainingReport(experts, settings=settings.determining())
        self.first = 0
        self.recent: Sequence[Tensor] = ()
        self._settings, self._state = settings, state
        self._learner, self._owner = learner, owner
        self._started = time.monotonic()
        self._best = Best()
        if (found := state.restore(parameters, self.optimizer)) is not None:
            self.first, values, self.recent, self.report = found
            self._best = Best.again([loss for _, loss in self.report.evaluations], values)
        self._before = self.report.seconds
        # after how many steps, and which, parameters the loss was last finite with
        self._good_step, self._good = self.first, copied(parameters)

    def require_finite(self, number: int, values: Mapping[str, float]) -> None:
        """Raises TrainingError, with the last good parameters put back, for a value of this step that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(f"{name} is {value} {self._ended(number)}")

    @contextmanager
    def finite_weights(self, number: int) -> Iterator[None]:
        """Raises as `require_finite` where the mixture refuses the router's weights."""
        try:
            yield
        except WeightingError as error:
            raise TrainingError(f"{error}. It was {self._ended(number)}") from error

    def _ended(self, number: int) -> str:
        """Puts the last good parameters back, and says where the training ended and what the way out is."""
        return (
            f"at step {number} of {self._learner}: lower lr, or look for damaged rows. {self.put_back()}, with which it was "
            "last finite"
        )

    def gradient_norm(self, number: int) -> float:
        """The length of the step's gradient, which every parameter has from here on. Raises as `require_finite`."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self.require_finite(number, {"the length of the gradient": norm})
        return norm

    def good(self, step: int) -> None:
        """The parameters, after so many steps, are those to go back to."""
        if self._good[0].device == self.parameters[0].device:
            # memory that is there already costs less than new memory in every step
            put(self.parameters, self._good)
        else:
            # a Trainer of several processes has moved them since the beginning
            self._good = copied(self.parameters)
        self._good_step = step

    def put_back(self) -> str:
        """Gives the parameters their last good values, and says so."""
        put(self._good, self.parameters)
        return f"The {self._owner} has the parameters after {self._good_step} steps"

    def stepped(self, loss: float, terms: Mapping[str, float]) -> None:
        """One more step, with its loss and terms, was taken."""
        self.report.losses.append(loss)
        for name, value in terms.items():
            self.report.terms.setdefault(name, []).append(value)

    def evaluates(self, step: int) -> bool:
        """Whether the rows held out are due after so many steps."""
        return step % self._settings.evaluate_every == 0 or step == self._settings.steps

    def evaluated(self, step: int, loss: float) -> None:
        """Their loss after so many steps. Raises as `require_finite`."""
        self.require_finite(step + 1, {"the loss of the rows held out": loss})
        self.report.evaluations.append((step, loss))
        if self._best.judge(loss, self.parameters):
            self.report.kept = step

    @property
    def stops(self) -> bool:
        """Whether so many evaluations were no better that the training ends."""
        return self._settings.patience is not None and self._best.waited >= self._settings.patience

    def timed(self) -> None:
        """Writes into the report how long it has taken by now."""
        self.report.seconds = self._before + time.monotonic() - self._started

    def shown(self, seen: str) -> str:
        """The last losses and what else was `seen`, in a line."""
        held_out = f"  held out {self.report.evaluations[-1][1]:.3f}" if self.report.evaluations else ""
        return f"loss {self.report.losses[-1]:.3f}{held_out}{seen}"

    def save(self, step: int, recent: Sequence[Tensor]) -> None:
        """Keeps the state, if it is time after so many steps."""
        if step % self._settings.checkpoint_every == 0 or step == self._settings.steps or self.stops:
            self._state.save(step, self.parameters, self.optimizer, self._best.values, recent, self.report)

    def finish(self) -> dict[str, Any]:
        """The report; the parameters are the best from here on."""
        if self._best.values:
            put(self._best.values, self.parameters)
        else:
            self.report.kept = len(self.report.losses)
        return self.report.to_json()
