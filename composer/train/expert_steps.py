"""The training of an expert model, step by step: the checks of its steps, and what is kept of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from loraweave.composer.model.batches import IGNORED
from loraweave.composer.train.learner import ExpertLearner
from loraweave.composer.train.progress import POINTS, WINDOW, TrainingProgress
from loraweave.composer.train.schedule import Stream
from loraweave.composer.train.settings import ExpertSettings
from loraweave.composer.train.state import KeptState
from loraweave.composer.train.tensor_rows import Feed
from loraweave.errors import TrainingError
from loraweave.routers.recipes._gate import Gate
from loraweave.routers.recipes._recipe import Recipe
from loraweave.routers.recipes._token_gates import TokenGate
from loraweave.routers.tokens._learned import Step, TrainingReport


class ExpertSteps(TrainerCallback):  # type: ignore[misc]
    """A watcher of a Trainer's steps, which checks them and keeps their results."""

    def __init__(
        self,
        model: ExpertLearner,
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
        self._overflow = Overflow(model, self.progress.report)
        self._moves = Moves(model)
        self._first_steps = FirstSteps(model.recipe, {} if self.progress.first else named, rows, settings)
        self.num_passes = 0
        self._totals: dict[str, Tensor] = {}

    def begin(self, trainer: Trainer) -> None:
        """Set the Trainer whose steps these are."""
        self._trainer = trainer

    def see(self, loss: Tensor, terms: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> None:
        """Note one pass of the running step, with its share of the step's loss and terms."""
        self.num_passes += 1
        # terms of processes are averaged, losses of their tokens added up
        parts = {"": loss.detach(), **{name: term.detach() / self._num_processes for name, term in terms.items()}}
        for name, value in parts.items():
            self._totals[name] = self._totals.get(name, 0.0) + value.double()
        self.progress.watch.see(self._model.notes)
        self._overflow.see(self._model.notes.weights, self._feed.labels(inputs))
        self._moves.see(self._model.notes)
        self.progress.report.tokens += self._feed.size(inputs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:
            self._evaluate(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the step: gradients are complete, and no parameter has changed."""
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
        self._moves.end_step(self._sum)
        seen = self._overflow.end_step(number, self._sum)
        self.progress.close(number, self._evaluate, mean=self._mean, seen=seen, saves=state.is_world_process_zero)
        self._tell(number)
        control.should_training_stop = control.should_training_stop or self.progress.stops

    def finish(self) -> None:
        """Leave the model with the best parameters and the report."""
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
        """Note the mean loss over the rows held out, counted as the feed counts, with the model as it will be used."""
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
    """A check of which parameters have got a gradient.

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
        """Return what to say of parameters that lack a due gradient after a step's backward passes; "" if none does."""
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


class Moves:
    """A count of the choices of a step's real tokens, by which gates move what no gradient moves."""

    def __init__(self, model: ExpertLearner) -> None:
        gates = {name: model.gate_of(site) for name, site in model.sites.items()}
        self._gates = {name: gate for name, gate in gates.items() if gate is not None and gate.moved}
        self._chosen: dict[Gate, Tensor] = {}

    def see(self, step: Step) -> None:
        """Count the choices of one pass of the running step."""
        for place, w_BTE in step.weights.items() if self._gates else ():
            # of a layer that runs several times, each run
            if (gate := self._gates.get(place.partition(" (run ")[0])) is not None:
                chosen_E = (step.real(w_BTE.detach()) != 0).sum(dim=0)
                self._chosen[gate] = self._chosen.get(gate, 0) + chosen_E

    @torch.no_grad()
    def end_step(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Move the gates by the counts of the step that is over. `summed` adds up over processes."""
        for gate, chosen_E in self._chosen.items():
            gate.move(summed(chosen_E))
        self._chosen.clear()


MUCH = 0.2


class Overflow:
    """The share of experts chosen by tokens before a target that had no capacity left, step by step.

    A row's targets are its last tokens, so that most of what the first tokens leave over is taken from them. Where labels
    are not those of tokens, all tokens count.
    """

    def __init__(self, model: ExpertLearner, report: TrainingReport) -> None:
        self._recipe, self._report = model.recipe, report
        gates = [gate for gate in model.gates.values() if isinstance(gate, TokenGate) and gate.capacity is not None]
        self._most = gates[0].most if gates else 0
        # experts that had no capacity left, and all that were chosen
        self._counts = torch.zeros(2, dtype=torch.float64)
        self._warned = False
        self._whose = "tokens before a target"

    def see(self, w_BTE: Mapping[str, Tensor], labels_BK: Tensor | None) -> None:
        """Count a pass of the running step: the weights of each site, and the labels of its last tokens; None: all count."""
        if not self._most:
            return
        if labels_BK is None:
            self._whose = "tokens"
            counted = [site_BTE.flatten(0, 1) for site_BTE in w_BTE.values()]
        else:
            before_BK = functional.pad((labels_BK != IGNORED)[:, 1:], (0, 1))
            num_rows, num_last = before_BK.shape
            seen = [site_BTE for site_BTE in w_BTE.values() if len(site_BTE) == num_rows and site_BTE.shape[1] >= num_last]
            counted = [site_BTE[:, -num_last:][before_BK] for site_BTE in seen]
        if counted:
            chosen = self._most * sum(len(w_NE) for w_NE in counted)
            kept = torch.stack([(w_NE != 0).sum() for w_NE in counted]).sum()
            self._counts += torch.tensor([chosen - int(kept), chosen], dtype=torch.float64)

    def end_step(self, number: int, summed: Callable[[Tensor], Tensor]) -> str:
        """End the `number`th step; return the text to show of it. Warns, once, when much has overflowed for some steps.

        `summed` adds up over processes.
        """
        if not self._most:
            return ""
        dropped, chosen = summed(self._counts).tolist()
        self._counts = torch.zeros_like(self._counts)
        shares = self._report.overflow
        shares.append(dropped / max(chosen, 1.0))
        recent = sum(shares[-WINDOW:]) / WINDOW
        if len(shares) >= WINDOW and recent > MUCH and not self._warned:
            self._warned = True
            by_weight = "prioritised=True, " if self._recipe.options.get("prioritised") is False else ""
            warnings.warn(
                f"recipe {self._recipe.name!r}: over the last {WINDOW} steps {recent:.0%} of the experts that "
                f"{self._whose} chose had no capacity left. Evaluation has no such limit, so that experts then see tokens "
                f"they have not learned from: take {by_weight}a larger capacity, None for no limit, or a larger balance",
                stacklevel=5,
            )
        return f"  overflow {shares[-1]:.0%}"
