"""The learner in the training of experts: a base model with a recipe's experts and gates, and how rows reach it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.model.batches import IGNORED
from loraweave.composer.train.rows import Owners, RowReader, TrainingRow
from loraweave.composer.train.schedule import NO_TOKENIZER, call_labelled, label_rows
from loraweave.errors import TrainingError
from loraweave.routers.recipes._gate import Gate
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.routers.tokens._call import has_two_sequences


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
