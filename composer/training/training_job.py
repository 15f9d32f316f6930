"""What can be trained beside others in one pass through a frozen base."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from loraweave.composer.batches import EncodedRow


class LowRank(NamedTuple):
    """scale * (x a_RI^T) b_OR^T."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


class TrainingJob(Protocol):
    """Parameters, and what they add to the outputs of the base's layers, for the rows of a batch that are the job's own.

    An adapter's is one product of factors in each layer (`LoraJob`); all jobs' products of a layer then are one step of
    autograd. A model of experts gives no product but computes its own `update` from the inputs of its rows alone: gates,
    experts, whatever it has, with the parameters that it names (`composer/experts/expert_job.py`). What its loss has beside
    that of the targets is its `penalty`. No row of one job reaches the parameters of another: its gradients are those of
    training it alone.
    """

    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> Collection[str]:
        """Module paths of the layers whose outputs it changes."""
        ...

    def parameters(self) -> list[Tensor]:
        """What is trained, in an order that does not change."""
        ...

    def take(self, rows: Sequence[EncodedRow], step: int | None) -> None:
        """The next forward has these rows of the job: of a step, counted from 0, or of an evaluation."""
        ...

    def begin(self, inputs: Mapping[str, Any], prompt_BT: Tensor | None) -> None:
        """A forward begins with these arguments of the model, cut to the job's rows; so is the mask of what is prompt.

        With gradients it is a step of training, without it is an evaluation.
        """
        ...

    def low_rank(self, layer: str) -> LowRank | None:
        """The update of a layer where it is one product of factors; else None, and `update` is asked."""
        ...

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        """update_BTO of a layer for the job's rows of its input."""
        ...

    def penalty(self) -> Tensor | None:
        """What its loss of the forward that has just run has beside the loss of the targets, a scalar, if anything."""
        ...
