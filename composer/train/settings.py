"""The settings of a training: what the result depends on besides data, model and start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import torch

from loraweave.common.checks import is_collection, is_list
from loraweave.common.descent import seeded, warmed_cosine
from loraweave.common.options import Count, NonNegative, Positive, Range, Whole, check_options, options_of
from loraweave.composer.model.batches import EncodedRow
from loraweave.composer.train.rows import Texts
from loraweave.errors import InvalidTask, TrainingError
from loraweave.routers.weights import LARGEST
from loraweave.types import Task

WARMUP_STEPS = 10
Row = TypeVar("Row")
# AdamW divides its first step by 1 - beta1
FIRST_STEP = 10


@dataclass(frozen=True)
class Pace:
    """The pace of a job: `steps` of `batch_size` rows each, after `warmup` steps of a rising rate."""

    steps: Count = 60
    lr: Positive = 3e-3
    batch_size: Count = 8
    seed: int = 0
    warmup: Whole = WARMUP_STEPS

    def rate(self, step: int) -> float:
        """Return the learning rate: linear warm-up to `lr` in at most half of the steps, then half a cosine down to 0."""
        return warmed_cosine(self.lr, step, self.steps, min(self.warmup, self.steps // 2))

    def rows(self, rows: Sequence[EncodedRow], job: str, step: int) -> list[EncodedRow]:
        """Return the job's rows of one step: epochs in shuffled order, a function of (seed, job, step) alone."""
        return Stream(rows, self.seed, job).at(step, self.batch_size)


@dataclass(frozen=True)
class Stream(Generic[Row]):
    """A stream of rows in epochs of shuffled order; `key` tells it from the others of one training."""

    rows: Sequence[Row]
    seed: int
    key: str

    def at(self, step: int, count: int) -> list[Row]:
        """Return the `count` rows of one step."""
        chosen: list[Row] = []
        orders: dict[int, list[int]] = {}
        for place in range(step * count, (step + 1) * count):
            epoch, offset = divmod(place, len(self.rows))
            if epoch not in orders:
                orders[epoch] = torch.randperm(len(self.rows), generator=seeded(self.seed, self.key, epoch)).tolist()
            chosen.append(self.rows[orders[epoch][offset]])
        return chosen


class Learner(Protocol):
    """A learner with a learning rate of its own."""

    lr: ClassVar[float]


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training by AdamW, over `steps` steps of `batch_size` rows each.

    `lr`, by default the learner's own, is reached after `warmup` steps (at most half of all) and goes to 0 as half a cosine.
    A gradient longer than `clip` is shortened to it, None for no limit. `gradient_accumulation` splits a step's rows into as
    many passes: less memory, the same gradient of the loss; a term is the mean of the passes' own.
    `gradient_checkpointing` runs the model's blocks a second time in the backward pass instead of keeping what is inside
    them. `mixed_precision` "bf16" lets the model calculate its products in bfloat16; parameters and loss stay as they are.

    `evaluation` is a dataset whose loss is measured before the first and after every `evaluate_every` steps, and after the
    last; the parameters with the lowest are kept. With `patience`, the training ends once so many evaluations in a row have
    been no better. `checkpoint` is a folder: every `checkpoint_every` steps the state is kept there, and the same call goes
    on where it was interrupted, to the same bits.
    """

    steps: Count = 100
    lr: Positive | None = None
    batch_size: Count = 8
    # what numpy takes
    seed: Annotated[int, Range(least=0, below=2**32)] = 0
    warmup: Whole = 10
    weight_decay: NonNegative = 0.0
    clip: Positive | None = 1.0
    gradient_accumulation: Count | None = None
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    evaluation: Mapping[str, Any] | Iterable[Any] | None = None
    evaluate_every: Count = 20
    patience: Count | None = None
    checkpoint: str | Path | None = None
    checkpoint_every: Count = 20
    progress: bool = True

    # what the result does not depend on, or the caller looks at itself
    aside: ClassVar[tuple[str, ...]] = ("evaluation", "checkpoint", "checkpoint_every", "progress")

    @classmethod
    def of(cls, learner: Learner, given: Mapping[str, Any]) -> Self:
        """Return the settings of a call of fit(). Raises TrainingError for unknown ones and for values out of range."""
        check_options("fit()", given, options_of(cls), noun="setting", error=TrainingError)
        settings = cls(**given)
        settings = replace(settings, lr=learner.lr if settings.lr is None else settings.lr)
        settings._require_sense()
        return settings

    def identity(self) -> dict[str, Any]:
        """Return the settings that the result depends on, as JSON; the rows held out are left to the caller."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.aside}

    @property
    def highest_rate(self) -> float:
        assert self.lr is not None
        return self.lr

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return Pace(self.steps, self.highest_rate, self.batch_size, self.seed, self.warmup).rate(step)

    def _require_sense(self) -> None:
        """Raise TrainingError for settings that contradict each other, and for what their kinds do not say."""
        if self.patience is not None and self.evaluation is None:
            raise TrainingError("patience counts evaluations, but there is no evaluation: pass evaluation=rows held out")
        if self.highest_rate * max(FIRST_STEP, self.weight_decay) > LARGEST:
            raise TrainingError(
                f"lr is {self.lr!r} and weight_decay {self.weight_decay!r}: AdamW's steps would be beyond {LARGEST:.1e}, "
                "the largest number of fp32; rates are usually below 1"
            )


@dataclass(frozen=True)
class RouterSettings(TrainingSettings):
    """The settings of a router's training, beyond those of `TrainingSettings`.

    Where the router learns each expert's part from that expert's rows alone, a step has `batch_size` rows of every expert,
    and no gradient is shortened.

    `gradient_accumulation` None takes about `batch_size` rows at once. However many passes, the gradient of the loss is the
    same but for what dropout between a router's own layers draws (`xlora` with depth above 1).

    `balance` times the balance loss is added to the loss: it is 1 where all experts get alike, E where one of E gets all. So
    is `z` times the mean squared logarithm of the scores' partition sum, which keeps scores small. 0.01 and 0.001 are usual.

    `loss` "entropy" is that of the predictions at the places of the targets, whatever these are: rows need no labels, only
    answers, such as the model's own.
    """

    balance: NonNegative = 0.0
    z: NonNegative = 0.0
    loss: Literal["targets", "entropy"] = "targets"

    def identity(self) -> dict[str, Any]:
        # checkpoints from before there was another loss are gone on from
        return {name: value for name, value in super().identity().items() if (name, value) != ("loss", "targets")}


@dataclass(frozen=True)
class LoraSettings(Pace):
    """The settings of a training of adapters. `alpha / rank` is the scale of an update, `warmup` a number of steps."""

    rank: Count = 8
    alpha: Positive = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    linearized: bool = False

    @classmethod
    def of(cls, target_modules: Sequence[str], alpha: float | None, *, rank: int, **others: Any) -> Self:
        """Return the settings; `alpha` None is twice the rank. Raises TrainingError for no list of endings of paths."""
        if not is_collection(target_modules) or not target_modules:
            raise TrainingError(f"target_modules is {target_modules!r}; it must be a list of endings of module paths")
        return cls(target_modules=tuple(target_modules), alpha=2.0 * rank if alpha is None else alpha, rank=rank, **others)


def read_tasks(tasks: Mapping[str, Any]) -> dict[str, tuple[Task | Texts, ...]]:
    """Return the tasks or texts of each name: one, or those of a list.

    Raises TrainingError for no tasks and for tasks without examples, InvalidTask for other rows.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise TrainingError("no tasks to train: pass a mapping of names to examples")
    require_texts("task", tasks)
    read: dict[str, tuple[Task | Texts, ...]] = {}
    for name, task_rows in tasks.items():
        parts = [task_rows] if isinstance(task_rows, Texts) else task_rows
        try:
            read[name] = tuple(parts) if is_list(parts, Task | Texts) and parts else (Task.of(task_rows),)
        except InvalidTask as error:
            raise InvalidTask(f"task {name!r}: {error}") from error
        if not all(task.examples for task in read[name]):
            raise TrainingError(f"task {name!r} has no examples")
    return read


def require_texts(what: str, names: Iterable[Any]) -> None:
    """Raise TrainingError for names that are not texts."""
    if strange := [name for name in names if not isinstance(name, str)]:
        raise TrainingError(f"{what} {strange[0]!r} has no text for a name: name it by one")
