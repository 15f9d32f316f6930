"""Rows of tensors, as a base takes them: examples of expert models that are not language models."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loraweave.common.display import tracked
from loraweave.common.rows import located
from loraweave.composer.model.batches import IGNORED, takes
from loraweave.composer.train.learner import ExpertLearner
from loraweave.composer.train.rows import Owners, TrainingRow, examples_of
from loraweave.composer.train.schedule import NO_TOKENIZER, call_labelled, label_rows
from loraweave.errors import InvalidTask, TrainingError
from loraweave.routers.tokens._call import has_two_sequences

LABELS, IMAGES, EMBEDDINGS = "labels", "pixel_values", "inputs_embeds"
FORMS = (
    "rows are {name: tensor, array, list or number}, one example each without a batch dimension, with the inputs of the "
    "model by their names, 'labels', and 'task' where known"
)

Loss = Callable[[Any, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class TensorRow:
    """A row by its place in what the caller gave, from where it is read whenever a step has it.

    `task_key` is not among its columns; `expert` is the place of its task, or -1; `digest` is of its values, where asked.
    """

    source: Sequence[Any]
    place: int
    task_key: str
    expert: int
    digest: str

    def __len__(self) -> int:
        return 1

    def identity(self) -> list[Any]:
        """Return the row's digest and owner, as JSON."""
        return [self.digest, self.expert]

    def columns(self) -> dict[str, Tensor]:
        """Return the row's tensors by name."""
        return _columns(self.source[self.place], self.task_key, f"row {self.place + 1}")


class TensorReader:
    """A reader of datasets as `RowReader` reads them, but of rows of tensors, of one shape in each column."""

    def __init__(self, owners: Owners, model: nn.Module, loss: Loss | None, *, digests: bool) -> None:
        self._owners, self._loss, self._digests = owners, loss, digests
        self._model_name = type(model).__name__
        self._main = getattr(model, "main_input_name", "input_ids")
        self._taken = list(inspect.signature(model.forward).parameters)
        self._first: tuple[str, dict[str, Tensor]] | None = None

    def read(self, dataset: Any, *, what: str = "dataset") -> list[TensorRow]:
        """Return the rows of a dataset. Raises InvalidTask for data of another form, UnknownName for an unknown task."""
        rows = [row for where, owner, part in self._owners.parts(dataset, what) for row in self._rows(part, owner, where)]
        if not rows:
            raise InvalidTask(f"{what} is empty: {FORMS}")
        return rows

    def _rows(self, given: Any, own: int, where: str) -> list[TensorRow]:
        source = examples_of(given)
        if isinstance(source, str | bytes) or not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
            raise InvalidTask(f"{where} is {source!r:.80}, not rows: {FORMS}")
        if isinstance(source, DataLoader):
            raise InvalidTask(f"{where} is a DataLoader, whose batches are not rows: give its dataset")
        if not _is_numbered(source):
            source = [row for _, row in located(source, of=where)]
        if not len(source):
            raise InvalidTask(f"{where} is empty: {FORMS}")
        places = tracked(range(len(source)), f"read {where}", total=len(source))
        return [self._row(source, place, own, f"row {place + 1} of {where}") for place in places]

    def _row(self, source: Sequence[Any], place: int, own: int, where: str) -> TensorRow:
        row, key = source[place], self._owners.key
        columns = _columns(row, key, where)
        self._require(columns, where)
        return TensorRow(source, place, key, self._owners.of_row(row, own, where), _digest(columns) if self._digests else "")

    def _require(self, columns: Mapping[str, Tensor], where: str) -> None:
        """Raise InvalidTask for a row that the model cannot take, or not together with the first one."""
        # embeddings are in place of tokens
        needed = [self._main] if EMBEDDINGS not in columns else []
        needed += [LABELS] if self._loss is None else []
        if missing := [name for name in needed if name not in columns]:
            raise InvalidTask(f"{where} has no {missing[0]!r}, but {', '.join(map(repr, columns))}: {FORMS}")
        if strange := [] if self._loss is not None else [name for name in columns if name not in self._taken]:
            raise InvalidTask(
                f"{where} has {strange[0]!r}, which {self._model_name} does not take; it takes {', '.join(self._taken)}. "
                "What is for a loss of your own may have any name with loss=function(output, columns)"
            )
        if IMAGES in columns and not columns[IMAGES].is_floating_point():
            raise InvalidTask(
                f"{where} has pixel_values of {columns[IMAGES].dtype}: let the model's image processor make them"
            )
        if IMAGES in columns and columns[IMAGES].ndim == 4 and len(columns[IMAGES]) == 1:
            shape = tuple(columns[IMAGES].shape)
            raise InvalidTask(
                f"{where} has pixel_values of shape {shape}, a batch of one: a row is the image alone, [0] of it"
            )
        first, known = self._first = self._first or (where, dict(columns))
        if set(columns) != set(known):
            odd = sorted(set(columns) ^ set(known))[0]
            raise InvalidTask(f"{odd!r} is in only one of {first} and {where}: all rows must have the same columns")
        for column, value in columns.items():
            other = known[column]
            if value.shape != other.shape:
                raise InvalidTask(
                    f"{column!r} of {where} has shape {tuple(value.shape)}, but {tuple(other.shape)} in {first}: "
                    "rows are stacked, so resize images, and pad texts to one length"
                )
            if value.dtype != other.dtype:
                raise InvalidTask(
                    f"{column!r} of {where} is of {value.dtype}, but of {other.dtype} in {first}: rows are stacked, so give "
                    "all the same kind of numbers, such as 1.0 beside 0.5"
                )


class Feed(ABC):
    """The way of a training's rows through its model. With `counts_rows` each row counts alike in the loss of a step."""

    counts_rows: bool

    def __init__(self, model: ExpertLearner) -> None:
        self._model = model

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
        return len(inputs["task"]) if self.counts_rows else int((inputs[LABELS] != IGNORED).sum())

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return labels_BK of the last tokens, `IGNORED` where no loss is asked; None if labels are not of tokens."""
        return None if self.counts_rows else inputs[LABELS]

    def _own_loss(self, output: Any) -> tuple[Any, Tensor]:
        """Return the output of a call with labels, and the base's own loss. Raises TrainingError where it has none."""
        if self._model.own_loss is None:
            raise TrainingError(
                f"{type(self._model.base_model).__name__} gives no loss for labels, so there is nothing to learn: pass "
                "loss=function(output, row's columns)"
            )
        return output, self._model.own_loss


class TensorFeed(Feed):
    """A feed of stacked rows; the loss is the base's own for `labels`, or `loss(output, columns)`."""

    def __init__(self, model: ExpertLearner, loss: Loss | None) -> None:
        super().__init__(model)
        self._loss = loss
        self._taken = set(inspect.signature(model.base_model.forward).parameters)
        self.counts_rows = loss is not None or not predicts_tokens(model.base_model)

    def inputs_of(self, rows: Sequence[TensorRow]) -> dict[str, Any]:
        """Return the batch of `Feed`; floating-point inputs of the model are in its precision."""
        base, read = self._model.base_model, [row.columns() for row in rows]
        stacked = {name: torch.stack([columns[name] for columns in read]) for name in read[0]}
        dtype, device = next(base.parameters()).dtype, self._model.device
        for name, value in stacked.items():
            in_precision = value.is_floating_point() and name != LABELS and name in self._taken
            stacked[name] = value.to(device, dtype if in_precision else None)
        return {**stacked, "task": torch.tensor([row.expert for row in rows], device=device)}

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        columns = {name: value for name, value in inputs.items() if name != "task"}
        task_B, tasks = inputs["task"], self._model.tasks
        task = None if bool((task_B < 0).all()) else task_B
        if self._loss is None:
            return self._own_loss(model(**columns, task=task))
        model_inputs = {name: value for name, value in columns.items() if name != LABELS and name in self._taken}
        output = model(**model_inputs, task=task)
        names = [tasks[place] if place >= 0 else None for place in task_B.tolist()]
        loss = self._loss(output, {**columns, "task": names})
        if not isinstance(loss, Tensor) or loss.ndim or (torch.is_grad_enabled() and not loss.requires_grad):
            shown = f"a tensor of shape {tuple(loss.shape)}" if getattr(loss, "ndim", 0) else f"{loss!r:.60}"
            raise TrainingError(f"loss() gave {shown}; it must be one number of a tensor that came from the output")
        return output, loss

    def size(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["task"])


def predicts_tokens(model: nn.Module) -> bool:
    """Return whether the model is a language model: it reads token ids, and its outputs are logits of tokens."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return False
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def are_tensors(dataset: Any, model: nn.Module, loss: Loss | None) -> bool:
    """Return whether rows are read as tensors.

    They are for a loss of the caller's own, for a model that is not a language model, and for a row that has more than
    tokens, such as an image.
    """
    if loss is not None or not predicts_tokens(model):
        return True
    part: Any = next(iter(dataset.values()), None) if isinstance(dataset, Mapping) else dataset
    # a new iteration begins at the first row of what is numbered, and spends what is not
    row = next((row for _, row in located(part)), None) if _is_numbered(part) or hasattr(part, "columns") else None
    match row:
        case Mapping() as columns:
            arrays = {name: value for name, value in columns.items() if hasattr(value, "dtype")}
            return any(takes(model, name) and torch.as_tensor(value).is_floating_point() for name, value in arrays.items())
    return False


def _is_numbered(rows: Any) -> bool:
    """Return whether rows[number] is a row; in a data frame it would be a column."""
    if isinstance(rows, str) or hasattr(rows, "columns"):
        return False
    return hasattr(rows, "__getitem__") and hasattr(rows, "__len__")


def _columns(row: Any, task_key: str, where: str) -> dict[str, Tensor]:
    if not isinstance(row, Mapping):
        raise InvalidTask(f"{where} is {type(row).__name__}, no mapping: {FORMS}")
    columns = {}
    for name, value in row.items():
        if name == task_key:
            continue
        try:
            columns[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidTask(
                f"{where} has {value!r:.60} as {name!r}, which cannot become a tensor ({error}): {FORMS}. Images are made "
                "tensors by the model's image processor"
            ) from error
    return columns


def _digest(columns: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        value = columns[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TokenFeed(Feed):
    """A feed of rows of token ids and their targets; the loss is that of the target tokens."""

    counts_rows = False

    def __init__(self, model: ExpertLearner, tokenizer: Any) -> None:
        super().__init__(model)
        base = model.base_model
        self._two_sequences = has_two_sequences(base)
        head = getattr(base, "get_output_embeddings", lambda: None)()
        # where the head has experts, it sees all tokens that the others see
        whole = any(base.get_submodule(site) is head for site in model.sites)
        self._labelled = partial(label_rows, base, NO_TOKENIZER if tokenizer is None else tokenizer, whole=whole)

    def inputs_of(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        return {**self._labelled(rows)}

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        return self._own_loss(call_labelled(model, inputs, two_sequences=self._two_sequences))

    def size(self, inputs: Mapping[str, Any]) -> int:
        return int(inputs["attention_mask"].sum())
