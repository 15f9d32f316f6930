"""What determines a router's training besides its data and its experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from loraweave.composer.training.pace import Pace
from loraweave.errors import TrainingError
from loraweave.hub.whole_number import is_whole, require_whole
from loraweave.registry import nearest
from loraweave.routers.mixture import LARGEST

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
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise TrainingError(f"fit() has no setting {name!r}{nearest(name, known)}; it has {', '.join(known)}")
        settings = cls(**given)
        settings = replace(settings, lr=learner.lr if settings.lr is None else settings.lr)
        settings._require_ranges()
        return settings

    def determining(self) -> dict[str, Any]:
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
class Settings(TrainingSettings):
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
