"""FedMS (Wu et al. 2023, arXiv 2312.15926): a global expert that all clients train, then a local expert and gate each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraweave import TrainingError, experts
from loraweave.extend import Count
from loraweave.extend.recipes import ExpertModel, put_expert
from loraweave.extend.training import ExpertJob, caller_randomness
from loraweave.extensions.federated.strategies._strategy import (
    Client,
    Course,
    Order,
    Strategy,
    Tensors,
    Trained,
    layers_of,
    learn,
)

GATE = "gate/"


@dataclass(frozen=True, kw_only=True)
class Fedms(Strategy):
    """A strategy of two stages, which both weigh the clients by their sizes.

    In the first `global_rounds` the clients train one LoRA, FedAvg on a and b: the global expert. Then that is frozen, and
    client k trains an expert of its own and the gate of y = y0 + g E_global(x) + (1 - g) E_k(x), the recipe `fedms` of
    `lw.experts`; the server averages the gates alone. `capability` is the recipe's: how many blocks have an expert of the
    client. It is one number for all clients and rounds: the paper's Sparsely Activated LoRA, which activates more blocks in
    the course of the training as a client's resources allow, is not built. A client has an expert model in the end. Raises
    TrainingError if no round is left for the second stage.
    """

    global_rounds: Count = 1
    capability: Count | None = None

    def require(self, course: Course) -> None:
        if self.global_rounds >= course.rounds:
            raise TrainingError(
                f"strategy 'fedms' got global_rounds={self.global_rounds} of {course.rounds} rounds, and none is left "
                "for the clients' own experts: take more rounds, or fewer global ones"
            )
        # the recipe's errors are raised before the first round
        self.model(course, "", self.first(course), {}).close()

    def train(self, course: Course, order: Order) -> Trained:
        if not any(name.startswith(GATE) for name in order.received):
            return super().train(course, order)
        with caller_randomness(), self.model(course, order.client, order.received, order.own) as made:
            job = ExpertJob(order.client, made, seed=course.settings.seed + order.round)
            losses = learn(course, order, job)
            state = {name: value.detach().cpu().clone() for name, value in made.expert_state().items()}
            return Trained(_gates(made), state, losses)

    def expected(self, received: Tensors, update: Tensors) -> Mapping[str, tuple[int, ...]]:
        gates = {name: value for name, value in received.items() if name.startswith(GATE)}
        return super().expected(gates or received, update)

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        state = server | super().aggregate(course, server, updates, number)
        if number == self.global_rounds:
            with self.model(course, "", state, {}) as made:
                state |= _gates(made)
        return state

    def model(self, course: Course, client: str, server: Tensors, own: Tensors) -> ExpertModel:
        """Return the client's expert model on the base: its kept tensors with the server's global expert and gates."""
        settings = course.settings
        made = experts(
            "fedms",
            course.model,
            rank=course.rank,
            alpha=course.scale * course.rank,
            target_modules=settings.target_modules,
            seed=settings.seed,
            capability=self.capability,
        )
        made.load_state_dict(own, strict=False)
        put_expert(made, 0, course.adapter("global", layers_of(server), {}))
        with torch.no_grad():
            for name, parameter in made.gates.named_parameters():
                if GATE + name in server:
                    parameter.copy_(server[GATE + name])
        return made

    def client(self, course: Course, server: Tensors, client: Client, own: Tensors, card: Mapping[str, Any]) -> ExpertModel:
        return self.model(course, client.name, server, own)


def _gates(made: ExpertModel) -> Tensors:
    return {GATE + name: value.detach().cpu().clone() for name, value in made.gates.named_parameters()}
