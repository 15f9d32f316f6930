"""The training of an expert model, step by step: its settings, checks of its steps, and the results it keeps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from loraweave import TrainingError
from loraweave.extend import is_list
from loraweave.extend.recipes import ExpertModel, Recipe
from loraweave.extend.training import KeptState, Stream, TrainingProgress, TrainingSettings
from loraweave.extensions.expert_training.feeds import Feed
from loraweave.extensions.expert_training.identity import loss_identity

# the number of reports to callbacks in a training
POINTS = 100


@dataclass(frozen=True)
class ExpertSettings(TrainingSettings):
    """The settings of a training of experts: `batch_size` is the number of rows of a step, over all processes and passes.

    All others are those of `TrainingSettings`. `callbacks` are transformers' `TrainerCallback`s; every hundredth of the
    training they are told loss, entropy and the load of each expert in `on_log`.

    `loss(output, columns)` returns the mean loss of a pass, instead of the base's own: `columns` are those of its rows,
    stacked, with the names of their tasks in "task". A checkpoint identifies it by its name, its code and what it is
    bound to (`loss_identity`): with another loss, training starts from the beginning.
    """

    callbacks: Sequence[Any] = ()
    loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None

    def _require_sense(self) -> None:
        super()._require_sense()
        callbacks = self.callbacks
        if not is_list(callbacks) or not all(hasattr(callback, "on_step_end") for callback in callbacks):
            raise TrainingError(f"callbacks is {callbacks!r:.80}; it must be a list of transformers' TrainerCallbacks")
        if self.loss is not None and not callable(self.loss):
            raise TrainingError(f"loss is {self.loss!r:.80}; it must be a function of the output and the rows' columns")

    def products(self, device: torch.device) -> Any:
        """Return a context in which matrix products are in bfloat16 if `mixed_precision` is "bf16"."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def identity(self) -> dict[str, Any]:
        settings = super().identity()
        return settings if self.loss is None else {**settings, "loss": loss_identity(self.loss)}

    aside: ClassVar[tuple[str, ...]] = (*TrainingSettings.aside, "callbacks", "loss")


class ExpertSteps(TrainerCallback):  # type: ignore[misc]
    """A callback that checks a Trainer's steps and keeps their results; `held` are the rows of the evaluation."""

    def __init__(
        self,
        model: ExpertModel,
        settings: ExpertSettings,
        rows: Sequence[Any],
        held: Sequence[Any],
        kept: KeptState,
        feed: Feed,
    ) -> None:
        self._model, self._settings, self._held, self._feed = model, settings, held, feed
        named = model.learning()
        learner = f"recipe {model.recipe.name!r}"
        self.progress = TrainingProgress(
            list(named.values()),
            settings,
            model.expert_names,
            kept,
            experts_of_layers=[range(shape.num_experts) for shape in model.shapes.values()],
            taught={row.expert for row in rows},
            learner=learner,
            owner="model",
            moved=model.moved(),
        )
        watchers: Iterable[Any] = dict.fromkeys(gate.watcher for gate in model.gates.values())
        self._watchers = [watcher(model, self.progress.report) for watcher in watchers if watcher is not None]
        self._first_steps = FirstSteps(model.recipe, {} if self.progress.first else named, rows, settings)
        self.num_passes = 0
        self._totals: dict[str, Tensor] = {}

    def begin(self, trainer: Trainer) -> None:
        """Remember the Trainer whose steps this callback checks."""
        self._trainer = trainer

    def see(self, loss: Tensor, terms: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> None:
        """Note one pass of the running step: its share of the step's loss, of the loss's `terms` by name, and its batch."""
        self.num_passes += 1
        # terms of processes are averaged, losses of their tokens added up
        parts = {"": loss.detach(), **{name: term.detach() / self._num_processes for name, term in terms.items()}}
        for name, value in parts.items():
            self._totals[name] = self._totals.get(name, 0.0) + value.double()
        self.progress.watch.see(self._model.notes)
        for watcher in self._watchers:
            watcher.see(self._model.notes, self._feed.labels(inputs))
        self.progress.report.tokens += self._feed.size(inputs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:
            self._evaluate(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise TrainingError, before the step, for a value not finite or a parameter that never had a gradient."""
        number = state.global_step + 1
        totals = self._sum(torch.stack(list(self._totals.values()))).tolist()
        values = dict(zip(self._totals, totals, strict=True))
        self._totals, self.num_passes = {}, 0
        self.progress.judge(number, values.pop(""), values)
        if silent := self._first_steps.silent(number):
            raise TrainingError(f"{self.progress.put_back()}; {silent}")
        self.progress.good(number - 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        number = state.global_step
        seen = ""
        for watcher in self._watchers:
            seen += watcher.end_step(self._sum)
        self.progress.close(number, self._evaluate, mean=self._mean, seen=seen, saves=state.is_world_process_zero)
        self._tell(number)
        control.should_training_stop = control.should_training_stop or self.progress.stops

    def finish(self) -> None:
        """Finish the training: leave the model with the best parameters and the report."""
        self._model.report = self.progress.finish()

    def _tell(self, number: int) -> None:
        report = self.progress.report
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

    def _sum(self, values: Tensor) -> Tensor:
        reduced: Tensor = self._trainer.accelerator.reduce(values.to(self._model.device), reduction="sum")
        return reduced

    def _mean(self, seen: Tensor) -> Tensor:
        if self._num_processes == 1:
            return seen
        reduced: Tensor = self._trainer.accelerator.reduce(seen.to(self._model.device), reduction="mean").cpu()
        return reduced

    @torch.no_grad()
    def _evaluate(self, number: int) -> None:
        """Note the mean loss over the held-out rows (of tokens or of rows, as in training) after step `number`."""
        if not self._held:
            return
        trainer, model, size = self._trainer, self._model, self._settings.batch_size
        training = model.training
        model.eval()
        ordered = sorted(self._held, key=len)
        parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        sums = torch.zeros(2, dtype=torch.float64, device=model.device)
        for part in parts[trainer.args.process_index :: trainer.args.world_size]:
            inputs = self._feed.inputs_of(part)
            with self._settings.products(model.device):
                _, mean = self._feed.run(model, inputs)
            count = self._feed.count(inputs)
            sums += torch.stack([mean.double() * count, mean.new_tensor(count, dtype=torch.float64)])
        model.train(training)
        total, count = self._sum(sums).tolist()
        self.progress.note_evaluation(number, total / count)


class FirstSteps:
    """A check that each parameter gets a gradient in the first steps.

    One factor of an expert begins as 0: in the first step it alone has a gradient, and the other factor and the gates have
    one from the second on, or from the recipe's `num_first_steps`. Parameters are due once each task has had a row.
    """

    def __init__(
        self, recipe: Recipe, parameters: Mapping[str, nn.Parameter], rows: Sequence[Any], settings: ExpertSettings
    ) -> None:
        self._recipe, self._settings = recipe, settings
        self._parameters = parameters
        self._stream = Stream(rows, settings.seed, "rows")
        self._unseen = {row.expert for row in rows} if recipe.needs_tasks else set()
        self._due = set(parameters)

    def silent(self, number: int) -> str:
        """Return the error text on parameters that had no gradient by step `number` though one was due; "" for none."""
        if not self._due:
            return ""
        self._due -= {name for name in self._due if bool(self._parameters[name].grad.any())}  # type: ignore[union-attr]
        if number > 1:
            self._unseen -= {row.expert for row in self._stream.at(number - 1, self._settings.batch_size)}

        def waits(name: str) -> bool:
            return name.startswith("gates.") or any(part in name for part in self._recipe.silent_at_first)

        silent = sorted(name for name in self._due if number >= self._recipe.num_first_steps or not waits(name))
        if not silent or self._unseen or (number == 1 and self._recipe.needs_tasks):
            return ""
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        return (
            f"{len(silent)} parameters of recipe {self._recipe.name!r} had no gradient after {number} steps: {shown}. What "
            "is not to learn is frozen with requires_grad_(False)"
        )
