"""The jobs that can be trained beside others in one pass through a frozen base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.common.randomness import seeded
from loraweave.composer.model.batches import EncodedRow
from loraweave.composer.train.rows import HeldOut
from loraweave.composer.train.schedule import JobSize, Pace
from loraweave.types import Factors


class LowRank(NamedTuple):
    """A product of factors, scale * (x a_RI^T) b_OR^T."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


class TrainingJob(ABC):
    """The parameters of a job, and their update of the base's layers for the job's own rows of a batch.

    An adapter's update is one product of factors in each layer (`LoraJob`); all jobs' products of a layer then are one step
    of autograd. A model of experts gives no product but computes its own `update` from the inputs of its rows alone: gates,
    experts, whatever it has, with the parameters that it names (`composer/experts/together.py`). Its `penalty` is added to
    the loss of the targets. No row of one job reaches the parameters of another: its gradients are those of training it
    alone.
    """

    name: str

    @property
    @abstractmethod
    def layers(self) -> Collection[str]:
        """The module paths of the layers whose outputs the job changes."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Return the tensors that are trained, in an order that does not change."""

    def take(self, rows: Sequence[EncodedRow], step: int | None) -> None:  # noqa: B027 - factors are the same for all rows
        """Set the job's rows of the next forward: those of a step, counted from 0, or of an evaluation."""

    def begin(self, inputs: Mapping[str, Any], prompt_BT: Tensor | None) -> None:  # noqa: B027
        """Begin a forward with these arguments of the model and this mask of prompt tokens, both cut to the job's rows.

        With gradients it is a step of training, without it is an evaluation.
        """

    def low_rank(self, layer: str) -> LowRank | None:
        """Return the update of a layer if it is one product of factors; else None, and `update` is called."""
        return None

    @abstractmethod
    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        """Return update_BTO of a layer for the job's rows of its input."""

    def penalty(self) -> Tensor | None:
        """Return the part of the last forward's loss besides the loss of the targets, a scalar, if there is any."""
        return None


Pairs = Mapping[str, tuple[Tensor, Tensor]]


class LoraJob(TrainingJob):
    """A job of trainable factors {layer: (a_RI, b_OR)} in fp32; the update of a layer is `scale` times their product."""

    def __init__(self, name: str, factors: Pairs, scale: float) -> None:
        self.name = name
        self.scale = scale
        # by rank row in memory, as the products of the gradient give it
        laid = {layer: (a_RI, b_OR.T.contiguous().T) for layer, (a_RI, b_OR) in factors.items()}
        self.factors = {layer: (a_RI.requires_grad_(), b_OR.requires_grad_()) for layer, (a_RI, b_OR) in laid.items()}

    @property
    def layers(self) -> Collection[str]:
        return self.factors.keys()

    def parameters(self) -> list[Tensor]:
        """Return the factors that are trained."""
        return [tensor for pair in self.factors.values() for tensor in pair if tensor.requires_grad]

    def freeze_a(self) -> None:
        """Train b alone from now on."""
        for a_RI, _ in self.factors.values():
            a_RI.requires_grad_(False)

    def low_rank(self, layer: str) -> LowRank:
        return LowRank(*self.factors[layer], self.scale)

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        """Return update_BTO in the dtype of x."""
        a_RI, b_OR, scale = self.low_rank(layer)
        return functional.linear(functional.linear(x_BTI, a_RI.to(x_BTI.dtype)), (scale * b_OR).to(x_BTI.dtype))

    def result(self) -> dict[str, Factors]:
        """Return the update as factors with the scale folded into b, detached copies on the CPU."""
        products = {layer: self.low_rank(layer) for layer in self.layers}
        return {
            layer: Factors(a_RI.detach().cpu().clone(), (b_OR.detach().cpu() * scale).contiguous())
            for layer, (a_RI, b_OR, scale) in products.items()
        }


def new_factors(
    name: str, layers: Mapping[str, tuple[int, int]], *, rank: int, seed: int, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return new factors of layers (O, I): a uniform in +-1/sqrt(I), PEFT's default, by seed, name and layer; b zero."""
    factors = {}
    for layer, (num_outputs, num_inputs) in layers.items():
        # seeded by names, so that a job starts the same whatever jobs share its batch
        a_RI = torch.rand(rank, num_inputs, generator=seeded(seed, name, layer)).mul(2).sub(1)
        factors[layer] = (float(num_inputs**-0.5) * a_RI).to(device), torch.zeros(num_outputs, rank, device=device)
    return factors


def given_factors(start: Mapping[str, Factors], *, scale: float, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of an adapter's factors with the scale taken out of b: exact if it is a power of two, else rounded."""
    return {
        layer: (part.a_RI.to(device, torch.float32, copy=True), part.b_OR.to(device, torch.float32) / scale)
        for layer, part in start.items()
    }


class JobKind:
    """The kind of a training's jobs: LoRA. A subclass makes jobs of another class; workers get it pickled."""

    # True where all new factors begin alike and the card says that training was to first order
    linearized: ClassVar[bool] = False

    def require(self, model: Any, start: Collection[str]) -> None:
        """Raise for a model without what such jobs need, and for tasks that cannot have a `start`."""

    def make(self, name: str, pairs: Pairs, scale: float) -> LoraJob:
        """Return a job that begins with these factors."""
        return LoraJob(name, pairs, scale)

    def recipe(self) -> dict[str, Any]:
        """Return what the card of an adapter says of the kind, as JSON."""
        return {}

    def identity(self) -> list[str]:
        """Return what a result depends on besides settings, rows and start."""
        return []


LORA = JobKind()

# as many of a job's own batches tell how wide they are
MEASURED_STEPS = 32
# values, gradients and the two moments of AdamW
NUM_COPIES = 4


@dataclass(frozen=True)
class PlannedJob:
    """A planned job of `num_parameters`, built by `make` when its turn comes; its rows and rate follow from `pace`."""

    name: str
    make: Callable[[], TrainingJob]
    num_parameters: int
    rows: Sequence[EncodedRow]
    pace: Pace
    held_out: HeldOut | None = None

    def rows_at(self, step: int) -> list[EncodedRow]:
        """Return the rows of a step."""
        return self.pace.rows(self.rows, self.name, step)

    def size(self, model: Any) -> JobSize:
        """Return the size that the job will add to a step of the model."""
        held_out = () if self.held_out is None else self.held_out.rows
        seen = [*self.rows, *held_out]
        steps = range(min(self.pace.steps, MEASURED_STEPS))
        widths = [max(len(row) for row in self.rows_at(step)) for step in steps]
        return JobSize(
            num_rows=self.pace.batch_size,
            width=sum(widths) / len(widths),
            longest=max(len(row.prompt) if model.config.is_encoder_decoder else len(row) for row in seen),
            longest_target=max(len(row.target) for row in seen),
            num_parameters=self.num_parameters,
            num_copies=NUM_COPIES + (self.held_out is not None),
        )
