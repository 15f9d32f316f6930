"""pFedLoRA (Yi et al. 2023, arXiv 2310.13283): a small adapter that clients exchange, beside a network of each client's."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from loraweave import Adapter, Factors, TrainingError
from loraweave.extend import Range, algebra, factorise
from loraweave.extend.models import linear
from loraweave.extend.scoring import EncodedRow
from loraweave.extend.training import LoraJob, new_factors
from loraweave.extensions.federated.strategies._strategy import (
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


@dataclass(frozen=True, kw_only=True)
class Pfedlora(Strategy):
    """F_k(x) = W_k h_k(x) is client k's network, A(x) = b a h_k(x) the adapter on the same last hidden states h_k.

    Networks may differ in everything before h_k (`federate(models=...)`: kind, depth, heads, widths within) and in their
    weights. The size of h_k and the vocabulary are the same, so that one a and one b fit all; the authors' networks, too,
    differ before the 500 features that all end in. A round of client k: with A frozen, all weights of the target layers
    learn from mu CE(A) + (1 - mu) CE(F_k); then, with those frozen, a and b learn from CE(A), in as many steps again. The
    server averages a and b by the clients' sizes. The weights stay with the client; name all linear layers in
    `target_modules` for a network that learns as a whole.

    A client answers with W_k h_k + mu b a h_k: what is reported for it is one adapter of its model, of full rank in the
    target layers. Raises TrainingError for a model whose output layer is not linear, is a target itself, or has another
    shape than the others'.
    """

    mu: Annotated[float, Range(above=0, below=1)] = 0.5

    own_models: ClassVar[bool] = True

    def require(self, course: Course) -> None:
        _, shape = _output_layer(course)
        for name in course.clients:
            own_course = course.of(name)
            head, own_shape = _output_layer(own_course)
            if head in own_course.layers:
                raise TrainingError(f"strategy 'pfedlora' puts the adapter on {head!r}: leave it out of target_modules")
            if own_shape != shape:
                raise TrainingError(
                    f"strategy 'pfedlora' has one adapter for all clients, but the output layer of client {name!r} has the "
                    f"shape {own_shape} (vocabulary, hidden size), and the model's {shape}: give models with both alike"
                )

    def first(self, course: Course) -> Tensors:
        cpu, seed = torch.device("cpu"), course.settings.seed
        head, shape = _output_layer(course)
        (pair,) = new_factors("federation", {head: shape}, rank=course.rank, seed=seed, device=cpu).values()
        return tensors_of({head: Factors(*pair)})

    def train(self, course: Course, order: Order) -> Trained:
        own_course = course.of(order.client)
        device = next(own_course.model.parameters()).device
        begun = {layer: order.own.get(layer, torch.zeros(shape)).to(device) for layer, shape in own_course.layers.items()}
        network = MatrixJob(order.client, begun, own_course.layers)
        adapter = LoraJob(order.client, start_of(own_course, order.received), own_course.scale)
        (head,) = adapter.layers
        output_layer = own_course.model.get_submodule(_output_layer(own_course)[0])

        def of_adapter(rows: Sequence[EncodedRow]) -> Tensor:
            with output_layer.register_forward_hook(lambda _, args, output: adapter.update(head, args[0])):
                return plain_loss(own_course, network, rows)

        def of_both(rows: Sequence[EncodedRow]) -> Tensor:
            return self.mu * of_adapter(rows) + (1 - self.mu) * plain_loss(own_course, network, rows)

        with _frozen(adapter.parameters()):
            local = learn(own_course, order, network, loss=of_both, part=" network")
        with _frozen(network.parameters()):
            shared = learn(own_course, order, adapter, loss=of_adapter, part=" adapter")
        return Trained(factors_of(adapter), network.learned(), local + shared)

    def client(self, course: Course, server: Tensors, client: Client, own: Tensors, card: Mapping[str, Any]) -> Adapter:
        """Return the client's trained weights plus mu times the shared adapter, as one adapter of its model."""
        course = course.of(client.name)
        (shared,) = layers_of(server).values()
        local: Layers = {layer: Factors(*factorise(delta_OI)[:2]) for layer, delta_OI in own.items()}
        head, _ = _output_layer(course)
        return course.adapter(client.name, {**local, head: algebra.scale(shared, self.mu)}, card)


def _output_layer(course: Course) -> tuple[str, tuple[int, int]]:
    """Return the path and (O, I) of the output layer. Raises TrainingError for a model without a linear one."""
    head = course.model.get_output_embeddings() if hasattr(course.model, "get_output_embeddings") else None
    shape = None if head is None else linear.shape(head)
    if shape is None:
        raise TrainingError("strategy 'pfedlora' needs a model with a linear output layer, beside which the adapter lies")
    path = next(name for name, module in course.model.named_modules() if module is head)
    return path, shape[:2]


@contextmanager
def _frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Turn gradients off for the parameters inside the block, and on again after it."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)
