"""The conversion of data rows into batches of an expert model: as token ids and targets, or as tensors by input name."""

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
from torch.nn import functional
from torch.utils.data import DataLoader

from loraweave import InvalidTask, Task, TrainingError, UnknownName
from loraweave.extend import located, nearest, tracked
from loraweave.extend.recipes import ExpertModel, Recipe
from loraweave.extend.routing import has_two_sequences, prompted
from loraweave.extend.scoring import IGNORED, NO_TOKENIZER, batch, pad_apart, takes
from loraweave.extend.training import Owners, RowReader, TrainingRow

LABELS, IMAGES, EMBEDDINGS = "labels", "pixel_values", "inputs_embeds"
FORMS = (
    "rows are {name: tensor, array, list or number}, one example each without a batch dimension, with the inputs of the "
    "model by their names, 'labels', and 'task' where known"
)

Loss = Callable[[Any, Mapping[str, Any]], Tensor]


def feed_of(model: ExpertModel, dataset: Any, tokenizer: Any, loss: Loss | None, *, digests: bool) -> Feed:
    """Return the feed of a dataset's rows, as token ids or texts (TokenFeed) or as tensors by name (TensorFeed).

    It reads tensors for a `loss` of the caller's own, for a model that is not a language model, and for rows that have more
    than tokens, such as an image. `digests`: whether such rows get a digest of their values.
    """
    counts_rows = loss is not None or not predicts_tokens(model.base_model)
    if counts_rows or _has_more_than_tokens(dataset, model.base_model):
        return TensorFeed(model, loss, counts_rows=counts_rows, digests=digests)
    return TokenFeed(model, tokenizer)


def owners_of(recipe: Recipe) -> Owners:
    """Return the recipe's tasks as possible owners of rows; a recipe without tasks takes those that a dataset names."""
    learner, tasks = f"recipe {recipe.name!r}", recipe.tasks

    def unknown(task: object) -> UnknownName:
        if not isinstance(task, str):
            return UnknownName(f"{learner} has no task {task!r}: tasks are told by their names, which are texts")
        known = ", ".join(map(repr, tasks)) or "none yet, but those that the rows it was trained on have named"
        return UnknownName(f"{learner} has no task {task!r}{nearest(task, tasks)}; it has {known}")

    places = {task: place for place, task in enumerate(tasks)}
    return Owners(places, learner, "task", recipe.needs_tasks, unknown, grows=not tasks, heeded=recipe.heeds_tasks)


def predicts_tokens(model: nn.Module) -> bool:
    """Return True if the model is a language model: it reads token ids, and its outputs are logits of tokens."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return False
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def _has_more_than_tokens(dataset: Any, model: nn.Module) -> bool:
    part: Any = next(iter(dataset.values()), None) if isinstance(dataset, Mapping) else dataset
    # iterating twice would use up an iterator, and restarts a sequence
    row = next((row for _, row in located(part)), None) if _is_numbered(part) or hasattr(part, "columns") else None
    if not isinstance(row, Mapping):
        return False
    arrays = {name: value for name, value in row.items() if hasattr(value, "dtype")}
    return any(takes(model, name) and torch.as_tensor(value).is_floating_point() for name, value in arrays.items())


def _is_numbered(rows: Any) -> bool:
    """Return True if rows[number] is a row of data; False for a text and a data frame, where it would be a column."""
    if isinstance(rows, str) or hasattr(rows, "columns"):
        return False
    return hasattr(rows, "__getitem__") and hasattr(rows, "__len__")


class Feed(ABC):
    """A reader of rows and maker of batches; a step's loss is a mean over rows if `counts_rows`, else over tokens."""

    counts_rows: bool

    def __init__(self, model: ExpertModel) -> None:
        self._model = model

    @abstractmethod
    def read(self, dataset: Any, owners: Owners, what: str = "dataset") -> Sequence[Any]:
        """Return the rows of a dataset, which errors call `what`; `owners` has the tasks that a row may belong to.

        Raises InvalidTask for data of another kind, UnknownName for an unknown task.
        """

    @abstractmethod
    def inputs_of(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return the rows as one batch, {input: tensor}; "task" has the index of each row's task, or -1."""

    @abstractmethod
    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Return (the model's output for a batch, its mean loss). Raises TrainingError without a loss."""

    @abstractmethod
    def size(self, inputs: Mapping[str, Any]) -> int:
        """Return the batch's size for the report: its number of tokens without padding, or of rows."""

    def count(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of terms in the batch's mean loss: target tokens, or rows if `counts_rows`."""
        return len(inputs["task"]) if self.counts_rows else int((inputs[LABELS] != IGNORED).sum())

    def labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return labels_BK of the last K tokens, `IGNORED` where a token has no loss; None if `counts_rows`."""
        return None if self.counts_rows else inputs[LABELS]

    def _own_loss(self, output: Any) -> tuple[Any, Tensor]:
        """Return (output, the loss that the base computed from the batch's labels). Raises TrainingError without one."""
        if self._model.own_loss is None:
            raise TrainingError(
                f"{type(self._model.base_model).__name__} gives no loss for labels, so there is nothing to learn: pass "
                "loss=function(output, row's columns)"
            )
        return output, self._model.own_loss


class TokenFeed(Feed):
    """A feed of rows of token ids and their targets; the loss is that of the target tokens."""

    counts_rows = False

    def __init__(self, model: ExpertModel, tokenizer: Any) -> None:
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


def label_rows(base_model: Any, tokenizer: Any, rows: Sequence[TrainingRow], *, whole: bool) -> dict[str, Tensor]:
    """Return the rows as {input of the model: tensor}, with "labels", and in "task" the index of each row's task.

    A decoder's labels are for all tokens with `whole`, and else, where the model can leave out the logits of other tokens,
    for its last ones: those of the longest target and one before it.
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
    """Return the model's output for inputs of `label_rows`; a row's prompt is all before its first label.

    `two_sequences`: whether the model is an encoder-decoder, which has its prompts apart.
    """
    inputs = dict(inputs)
    task_B, labels = inputs.pop("task"), inputs["labels"]
    # without any task, the argument is left out
    task = None if bool((task_B < 0).all()) else task_B
    if two_sequences or labels.shape == inputs["input_ids"].shape:
        return model(**inputs, task=task, use_cache=False)
    mask_BT, width = inputs["attention_mask"], labels.shape[1]
    prompt_BT = torch.cat([mask_BT[:, :-width], mask_BT[:, -width:] * ((labels != IGNORED).cumsum(dim=1) == 0)], dim=1)
    length = mask_BT.shape[1]
    keep = torch.arange(length - width, length, device=labels.device)
    with prompted(inputs["input_ids"], prompt_BT):
        return model(**inputs, logits_to_keep=keep, task=task, use_cache=False)


@dataclass(frozen=True)
class TensorRow:
    """A row by its index in the caller's `source`, from which it is read whenever a step needs it.

    `task_key` is the column that names the task, which is left out; `expert` is the task's index, or -1; `digest` is of the
    row's values, or "" if the feed takes none.
    """

    source: Sequence[Any]
    place: int
    task_key: str
    expert: int
    digest: str

    def __len__(self) -> int:
        return 1

    def identity(self) -> list[Any]:
        """Return [the row's digest, the index of its task], for JSON."""
        return [self.digest, self.expert]

    def columns(self) -> dict[str, Tensor]:
        """Return the row's tensors by name."""
        return _columns(self.source[self.place], self.task_key, f"row {self.place + 1}")


class TensorFeed(Feed):
    """A feed of stacked rows; the loss is the base's own for `labels`, or `loss(output, columns)`.

    With `counts_rows` a step's loss is a mean over rows, with `digests` rows have digests of their values.
    """

    def __init__(self, model: ExpertModel, loss: Loss | None, *, counts_rows: bool, digests: bool) -> None:
        super().__init__(model)
        self._loss, self._digests, self.counts_rows = loss, digests, counts_rows
        self._taken = list(inspect.signature(model.base_model.forward).parameters)

    def read(self, dataset: Any, owners: Owners, what: str = "dataset") -> list[TensorRow]:
        """Return the rows of a dataset, whose columns each have one shape and dtype in all rows.

        Raises InvalidTask for data of another kind, UnknownName for an unknown task.
        """
        rows: list[TensorRow] = []
        first: tuple[str, dict[str, Tensor]] | None = None
        for part, owner, given in owners.parts(dataset, what):
            source = _source(given, part)
            for place in tracked(range(len(source)), f"read {part}", total=len(source)):
                where, row = f"row {place + 1} of {part}", source[place]
                columns = _columns(row, owners.key, where)
                self._require(columns, where)
                first = first or (where, columns)
                _require_alike(columns, where, *first)
                digest = _digest(columns) if self._digests else ""
                rows.append(TensorRow(source, place, owners.key, owners.of_row(row, owner, where), digest))
        if not rows:
            raise InvalidTask(f"{what} is empty: {FORMS}")
        return rows

    def _require(self, columns: Mapping[str, Tensor], where: str) -> None:
        """Raise InvalidTask if the model cannot take a row of these columns; `where` names the row."""
        base = self._model.base_model
        # embeddings are in place of tokens
        needed = [getattr(base, "main_input_name", "input_ids")] if EMBEDDINGS not in columns else []
        needed += [LABELS] if self._loss is None else []
        if missing := [name for name in needed if name not in columns]:
            raise InvalidTask(f"{where} has no {missing[0]!r}, but {', '.join(map(repr, columns))}: {FORMS}")
        if strange := [] if self._loss is not None else [name for name in columns if name not in self._taken]:
            raise InvalidTask(
                f"{where} has {strange[0]!r}, which {type(base).__name__} does not take; it takes {', '.join(self._taken)}. "
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

    def inputs_of(self, rows: Sequence[TensorRow]) -> dict[str, Any]:
        """Return the rows stacked by column, with "task"; the model's floating-point inputs get its dtype."""
        read = [row.columns() for row in rows]
        stacked = {name: torch.stack([columns[name] for columns in read]) for name in read[0]}
        dtype, device = next(self._model.base_model.parameters()).dtype, self._model.device
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


def _source(given: Any, where: str) -> Sequence[Any]:
    """Return the rows of `given`, one part of a dataset, as a sequence. Raises InvalidTask if it is empty or not rows."""
    source = given.examples if isinstance(given, Task) else given
    if isinstance(source, str | bytes) or not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
        raise InvalidTask(f"{where} is {source!r:.80}, not rows: {FORMS}")
    if isinstance(source, DataLoader):
        raise InvalidTask(f"{where} is a DataLoader, whose batches are not rows: give its dataset")
    numbered: Any = source if _is_numbered(source) else [row for _, row in located(source, of=where)]
    if not len(numbered):
        raise InvalidTask(f"{where} is empty: {FORMS}")
    return numbered  # type: ignore[no-any-return]


def _require_alike(columns: Mapping[str, Tensor], where: str, first: str, known: Mapping[str, Tensor]) -> None:
    """Raise InvalidTask if the columns of row `where` cannot be stacked with `known`, those of the row named `first`."""
    if odd := sorted(set(columns) ^ set(known)):
        raise InvalidTask(f"{odd[0]!r} is in only one of {first} and {where}: all rows must have the same columns")
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


def _columns(row: Any, task_key: str, where: str) -> dict[str, Tensor]:
    if not isinstance(row, Mapping):
        raise InvalidTask(f"{where} is {type(row).__name__}, not a mapping: {FORMS}")
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
