"""What determines a training of experts besides its data and its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from loraweave.composer.experts.loss_identity import loss_identity
from loraweave.composer.router_training.settings import TrainingSettings
from loraweave.errors import TrainingError


@dataclass(frozen=True)
class ExpertSettings(TrainingSettings):
    """As `TrainingSettings`. `batch_size` counts the rows of all processes and passes of a step together.

    `callbacks` are transformers' `TrainerCallback`s; every hundredth of the training they are told loss, entropy and the
    load of each expert in `on_log`.

    `loss(output, columns)` is the mean loss of a pass, instead of the base's own: `columns` are those of its rows, stacked,
    with the names of their tasks in "task". A checkpoint knows it by its name, its code and what it is bound to
    (`loss_identity`): with another one the training begins anew.
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

    def determining(self) -> dict[str, Any]:
        found = super().determining()
        return found if self.loss is None else {**found, "loss": loss_identity(self.loss)}

    aside: ClassVar[tuple[str, ...]] = (*TrainingSettings.aside, "callbacks", "loss")
