"""What determines a training of experts besides its data and its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from loraweave.composer.router_training.settings import TrainingSettings


@dataclass(frozen=True)
class ExpertSettings(TrainingSettings):
    """As `TrainingSettings`. `batch_size` counts the rows of all processes and passes of a step together.

    `callbacks` are transformers' `TrainerCallback`s; every hundredth of the training they are told loss, entropy and the
    load of each expert in `on_log`.
    """

    callbacks: Sequence[Any] = ()

    aside: ClassVar[tuple[str, ...]] = (*TrainingSettings.aside, "callbacks")
