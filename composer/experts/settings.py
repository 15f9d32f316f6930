"""What determines a training of experts besides its data and its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from loraweave.composer.router_training.settings import TrainingSettings
from loraweave.errors import TrainingError


@dataclass(frozen=True)
class ExpertSettings(TrainingSettings):
    """As `TrainingSettings`. `batch_size` counts the rows of all processes and passes of a step together.

    `callbacks` are transformers' `TrainerCallback`s; every hundredth of the training they are told loss, entropy and the
    load of each expert in `on_log`.
    """

    callbacks: Sequence[Any] = ()

    def _require_ranges(self) -> None:
        super()._require_ranges()
        given = self.callbacks
        if not isinstance(given, Sequence) or not all(hasattr(each, "on_step_end") for each in given):
            raise TrainingError(f"callbacks is {given!r:.80}; it must be a list of transformers' TrainerCallbacks")

    aside: ClassVar[tuple[str, ...]] = (*TrainingSettings.aside, "callbacks")
