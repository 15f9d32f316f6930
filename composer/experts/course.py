"""One training of an expert model: what its steps are checked for, and what is kept of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import TrainerCallback

from loraweave.composer.batches import IGNORED
from loraweave.composer.experts.first_steps import FirstSteps
from loraweave.composer.experts.settings import ExpertSettings
from loraweave.composer.router_training.best import Best, copied, put
from loraweave.composer.router_training.kept_state import KeptState
from loraweave.composer.router_training.rows import TrainingRow
from loraweave.composer.router_training.watch import POINTS, Watch
from loraweave.errors import TrainingError
from loraweave.routers.routing.training_report import TrainingReport

if TYPE_CHECKING:
    from loraweave.composer.experts.expert_model import ExpertModel
    from loraweave.composer.experts.trainer import ExpertTrainer


class Course(TrainerCallback):  # type: ignore[misc]
    """Watches a Trainer's steps. `first` are the steps done before, by the same call when it was interrupted."""

    def __init__(
        self,
        model: ExpertModel,
        settings: ExpertSettings,
        rows: Sequence[TrainingRow],
        held: Sequence[TrainingRow],
        kept: KeptState,
    ) -> None:
        self._model, self._settings, self._held, self._state = model, settings, held, kept
        named = {name: value for name, value in model.expert_parameters().items() if value.requires_grad}
        self._parameters = list(named.values())
        self.optimizer = torch.optim.AdamW(self._parameters, lr=settings.highest_rate, weight_decay=settings.weight_decay)
        self._report = TrainingReport(model.expert_names, settings=settings.determining())
        self._best = Best()
        self.first, recent = self._resumed()
        taught = {row.expert for row in rows}
        counts = [range(shape.num_experts) for shape in model.shapes.values()]
        self._watch = Watch(counts, self._report, settings.steps, sorted(taught))
        self._watch.recent.extend(recent)
        self._first_steps = FirstSteps(model.recipe, {} if self.first else named, rows, settings)
        # after how many steps, and which, parameters the loss was last finite with
        self._good: tuple[int, list[Tensor]] = (self.first, copied(self._parameters))
        self.num_passes = 0
        self._totals: dict[str, Tensor] = {}
        self._started, self._before = time.monotonic(), self._report.seconds
        self._bar: Progress | None = None

    def begin(self, trainer: ExpertTrainer) -> None:
        """The Trainer whose steps these are."""
        self._trainer = trainer

    def show(self, bar: Progress) -> None:
        """Where to show the steps."""
        self._bar = bar
        total, done = self._settings.steps, self.first
        self._shown = bar.add_task(f"fit {self._model.recipe.name}", total=total, completed=done, seen="")

    def saw(self, loss: Tensor, terms: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
        """One pass of the running step, and what it counts in its loss and terms."""
        self.num_passes += 1
        # terms of processes are averaged, losses of their tokens added up
        parts = {"": loss.detach(), **{name: term.detach() / self._num_processes for name, term in terms.items()}}
        for name, value in parts.items():
            self._totals[name] = self._totals.get(name, 0.0) + value.double()
        self._watch.saw(self._model.notes)
        self._report.tokens += int(inputs["attention_mask"].sum())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:
            self._evaluate(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Gradients are complete, and no parameter has changed."""
        number = state.global_step + 1
        totals = self._summed(torch.stack(list(self._totals.values()))).tolist()
        self._values = dict(zip(self._totals, totals, strict=True))
        self._totals, self.num_passes = {}, 0
        names = {name: f"term {name!r}" if name else "the loss" for name in self._values}
        self._require_finite(number, {names[name]: value for name, value in self._values.items()})
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(torch.nn.utils.get_total_norm([parameter.grad for parameter in self._parameters]))  # type: ignore[misc]
        self._require_finite(number, {"the length of the gradient": norm})
        if silent := self._first_steps.silent(number):
            raise TrainingError(f"{self._put_back()}; {silent}")
        self._good = (number - 1, copied(self._parameters))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        number, settings, report = state.global_step, self._settings, self._report
        loss = self._values.pop("")
        report.losses.append(loss)
        for name, value in self._values.items():
            report.terms.setdefault(name, []).append(value)
        seen = self._watch.stepped(number, mean=self._averaged)
        if number % settings.evaluate_every == 0 or number == settings.steps:
            self._evaluate(number)
        report.seconds = self._before + time.monotonic() - self._started
        self._tell(number, loss, seen)
        stops = settings.patience is not None and self._best.waited >= settings.patience
        if (number % settings.checkpoint_every == 0 or number == settings.steps or stops) and state.is_world_process_zero:
            self._state.save(
                number, self._parameters, self.optimizer, self._best.values, list(self._watch.recent), self._report
            )
        control.should_training_stop = control.should_training_stop or stops

    def finish(self) -> None:
        """Leaves the model with the best parameters and the report."""
        if self._best.values:
            put(self._best.values, self._parameters)
        else:
            self._report.kept = len(self._report.losses)
        self._model.report = self._report.to_json()

    def _tell(self, number: int, loss: float, seen: str) -> None:
        report = self._report
        held_out = f"  held out {report.evaluations[-1][1]:.3f}" if report.evaluations else ""
        if self._bar is not None:
            self._bar.update(self._shown, advance=1, seen=f"loss {loss:.3f}{held_out}{seen}")
        if number % max(1, self._settings.steps // POINTS) == 0:
            told = {"loss": loss, **{f"term/{name}": values[-1] for name, values in report.terms.items()}}
            if report.entropy:
                told["entropy"] = report.entropy[-1]
                told |= {f"load/{name}": share for name, share in zip(report.experts, report.load[-1][1], strict=True)}
            self._trainer.log(told)

    def _require_finite(self, number: int, values: Mapping[str, float]) -> None:
        """Raises TrainingError, with the last good parameters put back, for a value that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {number} of recipe {self._model.recipe.name!r}: lower lr, or look for "
                    f"damaged rows. {self._put_back()}, with which it was last finite"
                )

    def _put_back(self) -> str:
        good, values = self._good
        put(values, self._parameters)
        return f"The model has the parameters after {good} steps"

    @property
    def _num_processes(self) -> int:
        return int(self._trainer.accelerator.num_processes)

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        found: Tensor = self._trainer.accelerator.reduce(values, reduction="sum")
        return found

    def _averaged(self, seen: Tensor) -> Tensor:
        if self._num_processes == 1:
            return seen
        found: Tensor = self._trainer.accelerator.reduce(seen.to(self._model.device), reduction="mean").cpu()
        return found

    @torch.no_grad()
    def _evaluate(self, number: int) -> None:
        """The mean loss over the target tokens of the rows held out, with the model as it will be used."""
        if not self._held:
            return
        trainer, model, size = self._trainer, self._model, self._settings.batch_size
        training = model.training
        model.eval()
        ordered = sorted(self._held, key=len)
        parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        sums = torch.zeros(2, dtype=torch.float64, device=model.device)
        for part in parts[trainer.args.process_index :: trainer.args.world_size]:
            inputs = trainer.inputs_of(part)
            with trainer.products():
                trainer.called(model, inputs)
            count = (inputs["labels"] != IGNORED).sum()
            assert model.own_loss is not None
            sums += torch.stack([model.own_loss.double() * count, count.double()])
        model.train(training)
        total, count = self._summed(sums).tolist()
        loss = total / count
        self._require_finite(number + 1, {"the loss of the rows held out": loss})
        self._report.evaluations.append((number, loss))
        if self._best.judge(loss, self._parameters):
            self._report.kept = number

    def _resumed(self) -> tuple[int, Sequence[Tensor]]:
        """How many steps were done before, and the load of the last ones."""
        found = self._state.restore(self._parameters, self.optimizer)
        if found is None:
            return 0, ()
        step, values, recent, self._report = found
        self._best = Best.again([loss for _, loss in self._report.evaluations], values)
        return step, recent
