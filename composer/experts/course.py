"""One training of an expert model: what its steps are checked for, and what is kept of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import TrainerCallback

from loraweave.composer.experts.first_steps import FirstSteps
from loraweave.composer.experts.overflow import Overflow
from loraweave.composer.experts.settings import ExpertSettings
from loraweave.composer.router_training.kept_state import KeptState
from loraweave.composer.router_training.training_progress import TrainingProgress
from loraweave.composer.router_training.watch import POINTS, Watch
from loraweave.errors import TrainingError

if TYPE_CHECKING:
    from loraweave.composer.experts.expert_model import ExpertModel
    from loraweave.composer.experts.trainer import ExpertTrainer


class Course(TrainerCallback):  # type: ignore[misc]
    """Watches a Trainer's steps."""

    def __init__(
        self,
        model: ExpertModel,
        settings: ExpertSettings,
        rows: Sequence[Any],
        held: Sequence[Any],
        kept: KeptState,
    ) -> None:
        self._model, self._settings, self._held = model, settings, held
        named = model.learning()
        learner = f"recipe {model.recipe.name!r}"
        self.progress = TrainingProgress(
            list(named.values()), settings, model.expert_names, kept, learner=learner, owner="model"
        )
        taught = {row.expert for row in rows}
        counts = [range(shape.num_experts) for shape in model.shapes.values()]
        self._watch = Watch(counts, self.progress.report, settings.steps, sorted(taught))
        self._watch.recent.extend(self.progress.recent)
        self._overflow = Overflow(model, self.progress.report)
        self._first_steps = FirstSteps(model.recipe, {} if self.progress.first else named, rows, settings)
        self.num_passes = 0
        self._totals: dict[str, Tensor] = {}
        self._bar: Progress | None = None

    def begin(self, trainer: ExpertTrainer) -> None:
        """The Trainer whose steps these are."""
        self._trainer = trainer

    def show(self, bar: Progress) -> None:
        """Where to show the steps."""
        self._bar = bar
        total, done = self._settings.steps, self.progress.first
        self._shown = bar.add_task(f"fit {self._model.recipe.name}", total=total, completed=done, seen="")

    def saw(self, loss: Tensor, terms: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> None:
        """One pass of the running step, and what it counts in its loss and terms."""
        self.num_passes += 1
        # terms of processes are averaged, losses of their tokens added up
        parts = {"": loss.detach(), **{name: term.detach() / self._num_processes for name, term in terms.items()}}
        for name, value in parts.items():
            self._totals[name] = self._totals.get(name, 0.0) + value.double()
        self._watch.saw(self._model.notes)
        feed = self._trainer.feed
        self._overflow.saw(self._model.notes.weights, feed.labels(inputs))
        self.progress.report.tokens += feed.size(inputs)

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
        self.progress.require_finite(number, {names[name]: value for name, value in self._values.items()})
        self.progress.gradient_norm(number)
        if silent := self._first_steps.silent(number):
            raise TrainingError(f"{self.progress.put_back()}; {silent}")
        self.progress.good(number - 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        number, progress = state.global_step, self.progress
        progress.stepped(self._values.pop(""), self._values)
        seen = self._watch.stepped(number, mean=self._averaged) + self._overflow.stepped(number, self._summed)
        if progress.evaluates(number):
            self._evaluate(number)
        progress.timed()
        self._tell(number, seen)
        if state.is_world_process_zero:
            progress.save(number, list(self._watch.recent))
        control.should_training_stop = control.should_training_stop or progress.stops

    def finish(self) -> None:
        """Leaves the model with the best parameters and the report."""
        self._model.report = self.progress.finish()

    def _tell(self, number: int, seen: str) -> None:
        report = self.progress.report
        if self._bar is not None:
            self._bar.update(self._shown, advance=1, seen=self.progress.shown(seen))
        if number % max(1, self._settings.steps // POINTS) == 0:
            told = {"loss": report.losses[-1], **{f"term/{name}": values[-1] for name, values in report.terms.items()}}
            if report.entropy:
                told["entropy"] = report.entropy[-1]
                told |= {"overflow": report.overflow[-1]} if report.overflow else {}
                told |= {f"load/{name}": share for name, share in zip(report.experts, report.load[-1][1], strict=True)}
            self._trainer.log(told)

    @property
    def _num_processes(self) -> int:
        return int(self._trainer.accelerator.num_processes)

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        found: Tensor = self._trainer.accelerator.reduce(values.to(self._model.device), reduction="sum")
        return found

    def _averaged(self, seen: Tensor) -> Tensor:
        if self._num_processes == 1:
            return seen
        found: Tensor = self._trainer.accelerator.reduce(seen.to(self._model.device), reduction="mean").cpu()
        return found

    @torch.no_grad()
    def _evaluate(self, number: int) -> None:
        """The mean loss over what counts in the rows held out, with the model as it will be used."""
        if not self._held:
            return
        trainer, model, size = self._trainer, self._model, self._settings.batch_size
        training = model.training
        model.eval()
        ordered = sorted(self._held, key=len)
        parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        sums = torch.zeros(2, dtype=torch.float64, device=model.device)
        for part in parts[trainer.args.process_index :: trainer.args.world_size]:
            inputs = trainer.feed.inputs_of(part)
            with trainer.products():
                _, mean = trainer.feed.called(model, inputs)
            count = trainer.feed.count(inputs)
            sums += torch.stack([mean.double() * count, mean.new_tensor(count, dtype=torch.float64)])
        model.train(training)
        total, count = self._summed(sums).tolist()
        self.progress.evaluated(number, total / count)
