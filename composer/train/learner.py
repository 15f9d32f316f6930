"""The learner in the training of experts: a base with a recipe's experts and gates, how rows reach it, and its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from loraweave.composer.model.batches import IGNORED, NO_TOKENIZER, batch, pad_apart, takes
from loraweave.composer.train.progress import POINTS, TrainingProgress
from loraweave.composer.train.rows import Owners, RowReader, TrainingRow
from loraweave.composer.train.settings import ExpertSettings, Stream
from loraweave.composer.train.state import KeptState
from loraweave.errors import TrainingError
from loraweave.routers.recipes._gate import Gate
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.routers.tokens._call import has_two_sequences, prompted


class ExpertLearner(nn.Module):
    """A model that is called like its base, with `task` for the tasks of the rows. `ExpertModel` is the implementation.

    The last call leaves `own_loss`, the base's loss of a call with labels, `terms`, the recipe's losses by name, and in
    training mode `notes`, what the gates did. `interrupted` has digests of the parameters that an interrupted training left,
    and began with; `report` is that of the last training.
    """

    base_model: nn.Module
    recipe: Recipe
    # the sites by their paths; experts and gates by keys
    sites: dict[str, Site]
    layers: nn.ModuleDict
    gates: nn.ModuleDict
    # of the first experts
    names: tuple[str, ...]
    own_loss: Tensor | None
    terms: dict[str, Tensor]
    notes: Any
    report: Mapping[str, Any] | None
    interrupted: tuple[str, str]

    @property
    def config(self) -> Any:
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that a row may belong to, in the order of the ids."""
        return self.recipe.tasks

    @property
    def shapes(self) -> dict[str, ExpertShape]:
        """The shapes of the experts of each site, by its path."""
        return {name: layer.shape for name, layer in self.named_layers().items()}

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of the experts of the site that has most."""
        most = max(shape.num_experts for shape in self.shapes.values())
        return (*self.names, *map(str, range(len(self.names), most)))

    def named_layers(self) -> dict[str, Any]:
        """Return the experts of each site, by its path."""
        return {name: self.layers[key_of(name)] for name in self.sites}

    def expert_state(self) -> dict[str, Tensor]:
        """Return the tensors of experts and gates, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("base_model.")}

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of experts and gates, by name."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("base_model.")}

    def learning(self) -> dict[str, nn.Parameter]:
        """Return the parameters that fit() trains, by name: experts, gates, and those of the base unfrozen by hand since."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def gate_of(self, site: Site) -> Gate | None:
        """Return the gate that weighs the experts of a site; None for weights of 1."""
        key = key_of(self.recipe.gate_key(site))
        if key not in self.gates:
            return None
        return self.gates[key]  # type: ignore[return-value]

    def moved(self) -> list[nn.Parameter]:
        """Return the parameters that fit() moves without a gradient."""
        gates = [gate for gate in self.gates.values() if isinstance(gate, Gate)]
        return [parameter for part in (*gates, *self.layers.values()) for parameter in part.moved]  # type: ignore[union-attr]

    def take_tasks(self, tasks: tuple[str, ...]) -> None:
        """Set the tasks of rows. Parts whose size depends on the number of tasks are rebuilt; others stay."""
        raise NotImplementedError


def key_of(path: str) -> str:
    """Return a site's or gate's key, without dots: torch takes a dot in a name for a step down."""
    return path.replace(".", "/")


class Feed(ABC):
    """The way of a training's rows through its model. With `counts_rows` each row counts alike in the loss of a step."""

    counts_rows: bool

    def __init__(self, model: ExpertLearner) -> None:
        self._model = model

    @abstractmethod
    def read(self, dataset: Any, owners: Owners, what: str = "dataset") -> Sequence[Any]:
        """Return the rows of a dataset. Raises InvalidTask for data of another form, UnknownName for an unknown task."""

    @abstractmethod
    def inputs_of(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return the rows as one batch, with each one's place among the tasks in `task`."""

    @abstractmethod
    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Return the model's output for a batch, and its mean loss. Raises TrainingError where there is no loss."""

    @abstractmethod
    def size(self, inputs: Mapping[str, Any]) -> int:
        """Return the batch's size in the report: tokens without padding, or rows."""

    def count(self, inputs: Mapping[str, Any]) -> int:
        """Return how much of the batch counts: target tokens, or rows."""
        return len(inputs["task"]) if self.counts_rows else int((inputs["labels"] != IGNORED).sum())

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return labels_BK of the last tokens, `IGNORED` where no loss is asked; None if labels are not of tokens."""
        return None if self.counts_rows else inputs["labels"]

    def _own_loss(self, output: Any) -> tuple[Any, Tensor]:
        """Return the output of a call with labels, and the base's own loss. Raises TrainingError where it has none."""
        if self._model.own_loss is None:
            raise TrainingError(
                f"{type(self._model.base_model).__name__} gives no loss for labels, so there is nothing to learn: pass "
                "loss=function(output, row's columns)"
            )
        return output, self._model.own_loss


class TokenFeed(Feed):
    """A feed of rows of token ids and their targets; the loss is that of the target tokens."""

    counts_rows = False

    def __init__(self, model: ExpertLearner, tokenizer: Any) -> None:
        super().__init__(model)
        self._tokenizer = tokenizer
        base = model.base_model
        self._two_sequences = has_two_sequences(base)
        head = getattr(base, "get_output_embeddings", lambda: None)()
        # where the head has experts, it sees all tokens that the others see
        whole = any(base.get_submodule(site) is head for site in model.sites)
        self._labelled = partial(label_rows, base, NO_TOKENIZER if tokenizer is None else tokenizer, whole=whole)

    def read(self, dataset: Any, owners: Owners, what: str = "dataset") -> list[TrainingRow]:
        return RowReader(owners, self._model.base_model, self._tokenizer).read(dataset, what=what)

    def inputs_of(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        return self._labelled(rows)

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        return self._own_loss(call_labelled(model, inputs, two_sequences=self._two_sequences))

    def size(self, inputs: Mapping[str, Any]) -> int:
        return int(inputs["attention_mask"].sum())


def predicts_tokens(model: nn.Module) -> bool:
    """Return whether the model is a language model: it reads token ids, and its outputs are logits of tokens."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return False
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def label_rows(base_model: Any, tokenizer: Any, rows: Sequence[TrainingRow], *, whole: bool) -> dict[str, Tensor]:
    """Return the rows as inputs of the model, with their `labels`, and in `task` each one's place among the tasks.

    The labels of a decoder are aligned with its last tokens, one before the longest target and those of it, where the model
    can leave out the logits of the others; with `whole`, with all tokens.
    """
    made = batch(base_model, tokenizer, rows)
    if base_model.config.is_encoder_decoder:
        made = pad_apart(made)
        labels = made.targets_BK
    else:
        length, width = made.inputs["input_ids"].shape[1], made.targets_BK.shape[1]
        before = 1 if takes(base_model, "logits_to_keep") and not whole else length - width
        labels = functional.pad(made.targets_BK, (before, 0), value=IGNORED)
    return {**made.inputs, "labels": labels, "task": torch.tensor([row.expert for row in rows], device=labels.device)}


def call_labelled(model: Any, inputs: Mapping[str, Tensor], *, two_sequences: bool) -> Any:
    """Return the model's output for inputs of `label_rows`, whose prompts are what stands before the first label."""
    inputs = dict(inputs)
    task_B, labels = inputs.pop("task"), inputs["labels"]
    # no row of a task is as if none were given
    task = None if bool((task_B < 0).all()) else task_B
    if two_sequences or labels.shape == inputs["input_ids"].shape:
        return model(**inputs, task=task, use_cache=False)
    mask_BT, width = inputs["attention_mask"], labels.shape[1]
    prompt_BT = torch.cat([mask_BT[:, :-width], mask_BT[:, -width:] * ((labels != IGNORED).cumsum(dim=1) == 0)], dim=1)
    length = mask_BT.shape[1]
    keep = torch.arange(length - width, length, device=labels.device)
    with prompted(inputs["input_ids"], prompt_BT):
        return model(**inputs, logits_to_keep=keep, task=task, use_cache=False)


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
        self._watchers = model.recipe.watchers(model, self.progress.report)
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
        for watcher in self._watchers:
            watcher.see(self._model.notes, self._feed.labels(inputs))
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
        seen = ""
        for watcher in self._watchers:
            seen += watcher.end_step(self._sum)
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
