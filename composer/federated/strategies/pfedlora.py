"""pFedLoRA (Yi et al. 2023, arXiv 2310.13283): a small adapter that clients exchange beside networks of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from loraweave.common.options import Range
from loraweave.composer.federated.strategies._strategy import (
    Client,
    Course,
    Layers,
    MatrixJob,
    Order,
    Strategy,
    Tensors,
    Trained,
    factors_of,
    layers_of,
    learn,
    plain_loss,
    start_of,
    tensors_of,
)
from loraweave.composer.model.batches import EncodedRow
from loraweave.composer.model.kinds import linear
from loraweave.composer.train.jobs import LoraJob, new_factors
from loraweave.errors import TrainingError
from loraweave.hub.adapter import Adapter
from loraweave.lowrank import algebra
from loraweave.lowrank.factorise import factorise
from loraweave.types import Factors


@dataclass(frozen=True, kw_only=True)
class Pfedlora(Strategy):
    """F_k(x) = W_out h_k(x) is client k's network, A(x) = b a h_k(x) the adapter on the same last hidden states h_k.

    A round of client k: with A frozen, all weights of the target layers learn from mu CE(A) + (1 - mu) CE(F_k); then, with
    those frozen, a and b learn from CE(A), in as many steps again. The server averages a and b by the clients' sizes. The
    weights stay with the client; name all linear layers in `target_modules` for a network all of which learns.

    A client answers with W_out h_k + mu b a h_k: what is reported for it is one adapter, of full rank in the target layers.
    The paper's clients have networks of different kinds before h; here all begin as one base. Raises TrainingError for
    a model whose output layer is not linear, or is a target itself.
    """

    mu: Annotated[float, Range(above=0, below=1)] = 0.5

    def require(self, course: Course) -> None:
        if (head := _head(course)) in course.layers:
            raise TrainingError(f"strategy 'pfedlora' puts the adapter on {head!r}: leave it out of target_modules")

    def first(self, course: Course) -> Tensors:
        head = _head(course)
        shape = linear.shape(course.model.get_submodule(head))
        assert shape is not None
        cpu, seed = torch.device("cpu"), course.settings.seed
        (pair,) = new_factors("federation", {head: shape[:2]}, rank=course.rank, seed=seed, device=cpu).values()
        return tensors_of({head: Factors(*pair)})

    def train(self, course: Course, order: Order) -> Trained:
        head = _head(course)
        module = course.model.get_submodule(head)
        device = next(course.model.parameters()).device
        begun = {layer: order.own.get(layer, torch.zeros(shape)).to(device) for layer, shape in course.layers.items()}
        network = MatrixJob(order.client, begun, course.layers)
        adapter = LoraJob(order.client, start_of(course, order.received), course.scale)

        def of_adapter(rows: Sequence[EncodedRow]) -> Tensor:
            with _instead(module, partial(_output, adapter, head)):
                return plain_loss(course, network, rows)

        def of_both(rows: Sequence[EncodedRow]) -> Tensor:
            return self.mu * of_adapter(rows) + (1 - self.mu) * plain_loss(course, network, rows)

        with _frozen(adapter.parameters()):
            local = learn(course, order, network, loss=of_both, part=" network")
        with _frozen(network.parameters()):
            shared = learn(course, order, adapter, loss=of_adapter, part=" adapter")
        return Trained(factors_of(adapter), network.learned(), local + shared)

    def client(self, course: Course, server: Tensors, client: Client, own: Tensors, card: Mapping[str, Any]) -> Adapter:
        """The client's network with mu times the adapter."""
        shared = {layer: algebra.scale(factors, self.mu) for layer, factors in layers_of(server).items()}
        local: Layers = {layer: Factors(*factorise(delta_OI)[:2]) for layer, delta_OI in own.items()}
        return course.adapter(client.name, {**local, **shared}, card)


def _head(course: Course) -> str:
    """The path of the output layer."""
    head = course.model.get_output_embeddings() if hasattr(course.model, "get_output_embeddings") else None
    if head is None or linear.shape(head) is None:
        raise TrainingError("strategy 'pfedlora' needs a model with a linear output layer, beside which the adapter lies")
    found: str = next(name for name, module in course.model.named_modules() if module is head)
    return found


def _output(adapter: LoraJob, head: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return adapter.update(head, args[0])


@contextmanager
def _frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within it they get no gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)


@contextmanager
def _instead(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
