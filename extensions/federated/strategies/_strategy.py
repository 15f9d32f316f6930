"""The base class of all strategies of federation, and the parts of a round that strategies share.

All that passes between server and clients are named fp32 tensors, so that a round can be checked, kept and sent anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from loraweave import Adapter, Factors, Fingerprint, TrainingError
from loraweave.extend import Declared
from loraweave.extend.scoring import EncodedRow
from loraweave.extend.training import (
    Descent,
    LoraJob,
    LoraSettings,
    SharedPass,
    TrainingJob,
    backward,
    given_factors,
    job_losses,
    new_factors,
)

Tensors = dict[str, Tensor]
Layers = Mapping[str, Factors]
Pairs = Mapping[str, tuple[Tensor, Tensor]]
Loss = Callable[[Sequence[EncodedRow]], Tensor]

A, B = ".a_RI", ".b_OR"


@dataclass(frozen=True)
class Client:
    """A client: its rows, its largest rank, and its size, the number of its examples.

    `rows_apart` is True if each row is made from one example alone (no other examples are shown in its prompt).
    """

    name: str
    rows: Sequence[EncodedRow]
    size: int
    rank: int
    rows_apart: bool


@dataclass(frozen=True)
class Course:
    """The settings that all rounds share: `layers` has (O, I) of each target layer, `sample_rate` is the share of clients.

    `own` has a course for each client that brings its own model, with that model, its layers and its base.
    """

    model: Any
    tokenizer: Any
    settings: LoraSettings
    layers: Mapping[str, tuple[int, int]]
    clients: Mapping[str, Client]
    rounds: int
    sample_rate: float
    base: Fingerprint
    own: Mapping[str, Course] = field(default_factory=dict)

    def of(self, client: str) -> Course:
        """Return the course on the client's own model, or this one if it brings none."""
        return self.own.get(client, self)

    @property
    def rank(self) -> int:
        """The largest rank of a client."""
        return max(client.rank for client in self.clients.values())

    @property
    def scale(self) -> float:
        return self.settings.alpha / self.settings.rank

    def adapter(self, name: str, layers: Layers, card: Mapping[str, Any]) -> Adapter:
        return Adapter(name, self.model.name_or_path, dict(layers), self.base, dict(card))


@dataclass(frozen=True)
class Order:
    """A client's input in a `round`, counted from 1: what it receives, and what it kept in its last round (`own`)."""

    client: str
    round: int
    received: Tensors
    own: Tensors


@dataclass(frozen=True)
class Trained:
    """A client's result of a round: the update it sends, what it keeps (`own`), and its losses before each step, or ()."""

    update: Tensors
    own: Tensors
    losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Strategy(Declared):
    """FedAvg on the factors of a LoRA (McMahan et al. 2017, arXiv 1602.05629); subclasses replace what they do otherwise.

    Round n begins with the server's state S on every client that takes part; the clients' updates u_k make the next S, here
    sum of n_k u_k over sum of n_k, n_k being the clients' sizes. Methods are pure: all that changes is in what they return.
    """

    noun: ClassVar[str] = "strategy"
    error: ClassVar[type[TrainingError]] = TrainingError
    # whether clients may have different ranks
    mixed_ranks: ClassVar[bool] = False
    # whether clients may have models of their own
    own_models: ClassVar[bool] = False
    # "count" draws a fixed number of clients for a round, "poisson" each independently
    sampling: ClassVar[Literal["count", "poisson"]] = "count"
    # whether seeds, clients and losses in an adapter's card would break the strategy's guarantee
    secret: ClassVar[bool] = False

    @property
    def options(self) -> dict[str, Any]:
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def require(self, course: Course) -> None:
        """Raise TrainingError, before the first round, for a course that does not suit the strategy."""

    def first(self, course: Course) -> Tensors:
        """Return the server's state before the first round: one random a for all, and b zero."""
        return tensors_of(new_layers(course))

    def sent(self, course: Course, server: Tensors, client: Client, own: Tensors) -> Tensors:
        """Return the tensors that the client receives: all, or with mixed ranks the first rows and columns of its rank."""
        return truncated(server, client.rank) if self.mixed_ranks else server

    def job(self, course: Course, order: Order) -> LoraJob:
        """Return the job that a client trains in a round, from the tensors that it received."""
        return LoraJob(order.client, start_of(course, order.received), course.scale)

    def train(self, course: Course, order: Order) -> Trained:
        """Train a client for a round; return the result."""
        job = self.job(course, order)
        losses = learn(course, order, job)
        return Trained(factors_of(job), {}, losses)

    def expected(self, received: Tensors, update: Tensors) -> Mapping[str, tuple[int, ...]]:
        """Return the names and shapes that an update must have."""
        return {name: tuple(value.shape) for name, value in received.items()}

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        """Return the server's state after round `number`, from the updates of the clients that took part."""
        return mean(list(updates.values()), sizes(course, updates))

    def layers(self, course: Course, state: Tensors) -> Layers:
        """Return the update of the base that a state of the server, or a client's received tensors, stands for."""
        return layers_of(state)

    def client(self, course: Course, server: Tensors, client: Client, own: Tensors, card: Mapping[str, Any]) -> Any:
        """Return a client's final model: an adapter, or an expert model."""
        return course.adapter(client.name, self.layers(course, self.sent(course, server, client, own)), card)

    def figures(self, course: Course, rounds_done: int) -> dict[str, float]:
        """Return further figures for the report after so many rounds."""
        return {}


def new_layers(course: Course) -> Layers:
    """Return each layer's new factors at the largest rank, a function of the seed alone."""
    settings = course.settings
    pairs = new_factors("federation", course.layers, rank=course.rank, seed=settings.seed, device=torch.device("cpu"))
    return {layer: Factors(a_RI, b_OR) for layer, (a_RI, b_OR) in pairs.items()}


def start_of(course: Course, received: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs (a_RI, b_OR) that a job begins with, on the model's device, the scale taken out of b."""
    device = next(course.model.parameters()).device
    return given_factors(layers_of(received), scale=course.scale, device=device)


def plain_loss(course: Course, job: TrainingJob, rows: Sequence[EncodedRow]) -> Tensor:
    """Return the mean loss of the rows' target tokens with the job's update, plus the job's penalty."""
    with SharedPass(course.model, [job], [len(rows)]):
        loss = job_losses(course.model, course.tokenizer, rows, 1)[0]
        penalty = job.penalty()
    return loss if penalty is None else loss + penalty


def learn(course: Course, order: Order, job: TrainingJob, *, loss: Loss | None = None, part: str = "") -> tuple[float, ...]:
    """Train a job on the client's rows for the steps of one round; return the loss before each step.

    The draw of rows follows from the seed, the client, the round and `part`, a text that sets several trainings of a round
    apart. Raises TrainingError for a loss that is not finite.
    """
    settings, rows = course.settings, course.clients[order.client].rows
    descent = Descent(job.parameters(), settings.rate)
    losses: list[float] = []
    for step in range(settings.steps):
        chosen = settings.rows(rows, f"{order.client} {order.round}{part}", step)
        job.take(chosen, step)
        value = (partial(plain_loss, course, job) if loss is None else loss)(chosen)
        losses += backward(value[None], {f"client {order.client!r}": step})
        descent.step(step)
        descent.optimizer.zero_grad()
    return tuple(losses)


def tensors_of(layers: Layers) -> Tensors:
    """Return factors as named tensors, contiguous like those read from a file, since products round by memory layout."""
    return {layer + suffix: part.contiguous() for layer, f in layers.items() for suffix, part in ((A, f.a_RI), (B, f.b_OR))}


def layers_of(state: Tensors) -> Layers:
    """Return the factors among named tensors, sorted by name, an order that the rounding of gradients' norms depends on."""
    names = sorted(name.removesuffix(A) for name in state if name.endswith(A))
    return {name: Factors(state[name + A], state[name + B]) for name in names}


def factors_of(job: LoraJob) -> Tensors:
    """Return the factors that a job has learned, the scale in b: detached copies on the CPU."""
    pairs = {layer: (a.detach().cpu().clone(), (b.detach().cpu() * job.scale)) for layer, (a, b) in job.factors.items()}
    return tensors_of({layer: Factors(a_RI, b_OR) for layer, (a_RI, b_OR) in pairs.items()})


def truncated(state: Tensors, rank: int) -> Tensors:
    """Return the first `rank` rows of each a and columns of each b."""
    return {name: (value[:rank] if name.endswith(A) else value[:, :rank]).contiguous() for name, value in state.items()}


def mean(updates: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Return the sum of w_k u_k over the sum of w_k, tensor by tensor, added in float64."""
    total = sum(weights)

    def of(name: str) -> Tensor:
        parts = [update[name].double() * (weight / total) for update, weight in zip(updates, weights, strict=True)]
        return torch.stack(parts).sum(dim=0).float()

    return {name: of(name) for name in updates[0]}


def sizes(course: Course, names: Iterable[str]) -> list[float]:
    """Return the clients' numbers of examples."""
    return [float(course.clients[name].size) for name in names]


class MatrixJob(TrainingJob):
    """A job that adds x D^T to y, with a D_OI trained in each layer, whole or only at fixed places (zero elsewhere).

    `values` has D_OI for each layer, or the vector of its trained values; `places` then has their flat places in D.
    """

    def __init__(
        self,
        name: str,
        values: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, int]],
        places: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.name = name
        self.values = {layer: value.clone().requires_grad_() for layer, value in values.items()}
        self._shapes, self._places = shapes, places

    @property
    def layers(self) -> Collection[str]:
        return self.values.keys()

    def parameters(self) -> list[Tensor]:
        return list(self.values.values())

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        delta_OI = self.values[layer]
        if self._places is not None:
            delta_OI = spread(delta_OI, self._places[layer], self._shapes[layer])
        return functional.linear(x_BTI, delta_OI.to(x_BTI.dtype))

    def learned(self) -> dict[str, Tensor]:
        """Return the trained values by layer, as detached copies on the CPU."""
        return {layer: value.detach().cpu().clone() for layer, value in self.values.items()}


def spread(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return D_OI, zero but for the values at their flat places."""
    flat = values.new_zeros(shape[0] * shape[1])
    return torch.index_add(flat, 0, places.to(values.device), values).view(shape)
