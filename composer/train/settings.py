"""Settings of a training: what the result depends on besides data, model and start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from loraweave.common.checks import is_whole, require_whole
from loraweave.common.options import options_of, require_known
from loraweave.composer.model.batches import EncodedRow
from loraweave.composer.train.loss_identity import loss_identity
from loraweave.composer.train.schedule import WARMUP_STEPS, Pace
from loraweave.errors import InvalidTask, TrainingError
from loraweave.routers.weights import LARGEST
from loraweave.types import Task

PRECISIONS = ("no", "bf16")
# AdamW divides its first step by 1 - beta1
FIRST_STEP = 10
# what numpy takes
SEEDS = 2**32
COUNTS = ("steps", "batch_size", "gradient_accumulation", "evaluate_every", "checkpoint_every")


class Learner(Protocol):
    """What has a learning rate of its own."""

    lr: ClassVar[float]


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW over `steps` steps of `batch_size` rows each.

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

    steps: int = 100
    lr: float | None = None
    batch_size: int = 8
    seed: int = 0
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float | None = 1.0
    gradient_accumulation: int | None = None
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    evaluation: Mapping[str, Any] | Iterable[Any] | None = None
    evaluate_every: int = 20
    patience: int | None = None
    checkpoint: str | Path | None = None
    checkpoint_every: int = 20
    progress: bool = True

    # coefficients, which are 0 or more
    coefficients: ClassVar[tuple[str, ...]] = ("weight_decay",)
    # what the result does not depend on, or the caller looks at itself
    aside: ClassVar[tuple[str, ...]] = ("evaluation", "checkpoint", "checkpoint_every", "progress")

    @classmethod
    def of(cls, learner: Learner, given: Mapping[str, Any]) -> Self:
        """The settings of a call of fit(). Raises TrainingError for unknown ones and for values out of range."""
        require_known("fit()", given, options_of(cls), noun="setting", error=TrainingError)
        settings = cls(**given)
        settings = replace(settings, lr=learner.lr if settings.lr is None else settings.lr)
        settings._require_ranges()
        return settings

    def identity(self) -> dict[str, Any]:
        """Those that the result depends on, as JSON; the rows held out are left to the caller."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.aside}

    @property
    def highest_rate(self) -> float:
        assert self.lr is not None
        return self.lr

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return Pace(self.steps, self.highest_rate, self.batch_size, self.seed, self.warmup).rate(step)

    def _require_ranges(self) -> None:
        for name in COUNTS:
            if name != "gradient_accumulation" or self.gradient_accumulation is not None:
                require_whole(name, getattr(self, name), 1, TrainingError)
        if not is_whole(self.seed, 0) or self.seed >= SEEDS:
            raise TrainingError(f"seed is {self.seed!r}; it must be a whole number from 0 to {SEEDS - 1}")
        if not is_whole(self.warmup, 0):
            raise TrainingError(f"warmup is {self.warmup!r}; it must be a whole number of steps, 0 for none")
        if self.patience is not None and not is_whole(self.patience, 1):
            raise TrainingError(f"patience is {self.patience!r}; it must be a whole number of evaluations, or None")
        if self.patience is not None and self.evaluation is None:
            raise TrainingError("patience counts evaluations, but there is no evaluation: pass evaluation=rows held out")
        for name in ("lr", "clip", *self.coefficients):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise TrainingError(f"{name} is {value!r}; it must be a number")
        # NaN fails every comparison
        if not 0 < self.highest_rate < math.inf:
            raise TrainingError(f"lr is {self.lr!r}; it must be above 0")
        if self.clip is not None and not self.clip > 0:
            raise TrainingError(f"clip is {self.clip!r}; it must be above 0, or None for no limit")
        for name in self.coefficients:
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise TrainingError(f"{name} is {value!r}; it must be at least 0, which is without")
        if self.highest_rate * max(FIRST_STEP, self.weight_decay) > LARGEST:
            raise TrainingError(
                f"lr is {self.lr!r} and weight_decay {self.weight_decay!r}: AdamW's steps would be beyond {LARGEST:.1e}, "
                "the largest number of fp32; rates are usually below 1"
            )
        if not isinstance(self.checkpoint, str | Path | None):
            raise TrainingError(f"checkpoint is {self.checkpoint!r}; it must be a folder, or None")
        if self.mixed_precision not in PRECISIONS:
            raise TrainingError(f"mixed_precision is {self.mixed_precision!r}; it must be 'no' or 'bf16'")


@dataclass(frozen=True)
class RouterSettings(TrainingSettings):
    """Those of a router: as `TrainingSettings`, but where the router learns each expert's part from that expert's rows alone
    a step has `batch_size` rows of every expert, and no gradient is shortened.

    `gradient_accumulation` None takes about `batch_size` rows at once. However many passes, the gradient of the loss is the
    same but for what dropout between a router's own layers draws (`xlora` with depth above 1).

    `balance` times the balance loss is added to the loss: it is 1 where all experts get alike, E where one of E gets all. So
    is `z` times the mean squared logarithm of the scores' partition sum, which keeps scores small. 0.01 and 0.001 are usual.
    """

    balance: float = 0.0
    z: float = 0.0

    coefficients: ClassVar[tuple[str, ...]] = ("balance", "z", "weight_decay")


@dataclass(frozen=True)
class LoraSettings:
    """The settings of a training. `alpha / rank` is the scale of an update, `warmup` a number of steps."""

    rank: int
    alpha: float
    steps: int
    lr: float
    batch_size: int
    target_modules: tuple[str, ...]
    seed: int
    warmup: int = WARMUP_STEPS
    linearized: bool = False

    @property
    def pace(self) -> Pace:
        """Its steps, whatever is trained in them."""
        return Pace(self.steps, self.lr, self.batch_size, self.seed, self.warmup)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.pace.rate(step)

    def rows(self, rows: Sequence[EncodedRow], job: str, step: int) -> list[EncodedRow]:
        """The job's rows of one step."""
        return self.pace.rows(rows, job, step)


def require_trainable(recipe: LoraSettings, tasks: Mapping[str, Any], jobs_per_batch: int) -> dict[str, Task]:
    """The tasks, read. TrainingError for settings out of range and for tasks without examples, InvalidTask for no rows."""
    if not isinstance(tasks, Mapping) or not tasks:
        raise TrainingError("no tasks to train: pass a mapping of names to examples")
    require_texts("task", tasks)
    require_steps(recipe.pace, jobs_per_batch)
    require_whole("rank", recipe.rank, 1, TrainingError)
    _require_positive("alpha", recipe.alpha)
    read = {}
    for name, given in tasks.items():
        try:
            read[name] = Task.of(given)
        except InvalidTask as error:
            raise InvalidTask(f"task {name!r}: {error}") from error
        if not read[name].examples:
            raise TrainingError(f"task {name!r} has no examples")
    return read


def require_steps(pace: Pace, jobs_per_batch: int) -> None:
    """TrainingError for numbers of steps, rows and jobs, and for rates, that are out of range."""
    counts = {"steps": (pace.steps, 1), "batch_size": (pace.batch_size, 1), "jobs_per_batch": (jobs_per_batch, 1)}
    for field, (value, least) in {**counts, "warmup": (pace.warmup, 0)}.items():
        require_whole(field, value, least, TrainingError)
    _require_positive("lr", pace.lr)


def require_memory(memory_bytes: Any) -> None:
    """Raises TrainingError for a value that is neither a number of bytes nor None."""
    if memory_bytes is not None and not is_whole(memory_bytes, 1):
        raise TrainingError(f"memory_bytes is {memory_bytes!r}; it must be None or a whole number of at least 1")


def require_texts(what: str, names: Iterable[Any]) -> None:
    """Raises TrainingError for names that are not texts."""
    if strange := [name for name in names if not isinstance(name, str)]:
        raise TrainingError(f"{what} {strange[0]!r} has no text for a name: name it by one")


def _require_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TrainingError(f"{field} is {value!r}; it must be a number")
    if not 0 < float(value) < math.inf:
        raise TrainingError(f"{field} is {value!r}; it must be above 0")


@dataclass(frozen=True)
class ExpertSettings(TrainingSettings):
    """As `TrainingSettings`. `batch_size` counts the rows of all processes and passes of a step together.

    `callbacks` are transformers' `TrainerCallback`s; every hundredth of the training they are told loss, entropy and the
    load of each expert in `on_log`.

    `loss(output, columns)` is the mean loss of a pass, instead of the base's own: `columns` are those of its rows, stacked,
    with the names of their tasks in "task". A checkpoint knows it by its name, its code and what it is bound to
    (`loss_identity`): with another loss, training starts from the beginning.
    """

    callbacks: Sequence[Any] = ()
    loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None

    def _require_ranges(self) -> None:
        super()._require_ranges()
        given = self.callbacks
        if not isinstance(given, Sequence) or not all(hasattr(each, "on_step_end") for each in given):
            raise TrainingError(f"callbacks is {given!r:.80}; it must be a list of transformers' TrainerCallbacks")
        if self.loss is not None and not callable(self.loss):
            raise TrainingError(f"loss is {self.loss!r:.80}; it must be a function of the output and the rows' columns")

    def products(self, device: torch.device) -> Any:
        """The precision of the model's products."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        return found if self.loss is None else {**found, "loss": loss_identity(self.loss)}

    aside: ClassVar[tuple[str, ...]] = (*TrainingSettings.aside, "callbacks", "loss")
