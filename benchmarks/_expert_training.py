"""How `experts` trains: rows of all tasks in turn with AdamW, or each task at a client that exchanges experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import loraweave as lw
from benchmarks._expert_kinds import ONE, Kind
from loraweave.composer.experts.exchange import federated_average, put_expert
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.make import with_options
from loraweave.composer.model.batches import IGNORED, EncodedRow, batch
from loraweave.composer.train.schedule import seeded
from loraweave.composer.train.steps import called

CLIP = 1.0


@dataclass(frozen=True)
class Data:
    """A task with the token ids of its training rows, and its test inputs with their accepted targets."""

    task: lw.Task
    rows: Sequence[EncodedRow]
    tests: Sequence[tuple[str, Sequence[str]]]


Stream = Iterator[tuple[str, EncodedRow]]


def stream(data: Mapping[str, Data], seed: int) -> Stream:
    """Rows of one task after another, each task's in a new order every time they have all been there."""
    waiting: dict[str, list[EncodedRow]] = {task: [] for task in data}
    generator = seeded(seed, "rows")
    while True:
        for task, of_task in data.items():
            if not waiting[task]:
                waiting[task] = [of_task.rows[at] for at in torch.randperm(len(of_task.rows), generator=generator).tolist()]
            yield task, waiting[task].pop()


def train(made: ExpertModel, tokenizer: Any, rows: Stream, *, steps: int, batch_size: int, lr: float | None = None) -> float:
    """Trains on the next rows and returns the mean loss of the last tenth of the steps.

    AdamW at the recipe's own learning rate unless `lr` is another, gradients clipped at a norm of 1.
    """
    parameters = [value for value in made.expert_parameters().values() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr or made.recipe.lr, weight_decay=0.0)
    taken = []
    made.train()
    for _ in range(steps):
        chosen = [next(rows) for _ in range(batch_size)]
        output = called(made, _labelled(made, tokenizer, chosen), two_sequences=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(float(output.loss.detach()))
    made.eval()
    return float(np.mean(taken[-max(1, steps // 10) :]))


def num_parameters(made: ExpertModel) -> int:
    return sum(value.numel() for value in made.expert_parameters().values() if value.requires_grad)


def _labelled(made: ExpertModel, tokenizer: Any, rows: Sequence[tuple[str, EncodedRow]]) -> dict[str, Tensor]:
    """Inputs padded on the left, labels of the last tokens, and each row's place among the tasks, -1 where there is none."""
    found = batch(made.base_model, tokenizer, [row for _, row in rows])
    labels_BK = functional.pad(found.targets_BK, (1, 0), value=IGNORED)
    task_B = torch.tensor([made.tasks.index(task) if made.tasks else -1 for task, _ in rows])
    return {**found.inputs, "labels": labels_BK, "task": task_B}


# times that clients exchange what they have in common in each of two stages, or phases
ROUNDS = 3
# of a client's five steps two are in the first stage, or in the phase of what is shared
FIRST = 0.4

Clients = dict[str, ExpertModel]


@dataclass(frozen=True)
class Federation:
    """Makes a client of each task, all from the same seed, and trains them on their own rows."""

    model: Any
    tokenizer: Any
    rows: Mapping[str, Stream]
    batch_size: int
    seed: int
    lr: float | None

    def clients(self, recipe: str, **options: Any) -> Clients:
        made = {"tokenizer": self.tokenizer, "seed": self.seed, **options}
        return {task: lw.experts(recipe, self.model, **made) for task in self.rows}

    def learn(self, clients: Clients, steps: int) -> float:
        """The mean over the clients of the loss of their last steps."""
        chosen: dict[str, Any] = {"steps": steps, "batch_size": self.batch_size, "lr": self.lr}
        return float(np.mean([train(client, self.tokenizer, self.rows[task], **chosen) for task, client in clients.items()]))


def federated(
    kind: Kind, model: Any, tokenizer: Any, data: Mapping[str, Data], *, steps: int, batch_size: int, seed: int
) -> tuple[Clients, dict[str, float]]:
    """A model of each task, how many parameters all of them have, those that are shared once, and their last loss."""
    rows = {task: stream({task: own}, seed) for task, own in data.items()}
    federation = Federation(model, tokenizer, rows, batch_size, seed, kind.lr)
    first = int(steps * FIRST) // (len(data) * ROUNDS)
    last = steps // (len(data) * ROUNDS) - first
    train_all = _fedms if kind.recipe == "fedms" else _pfedlora
    return train_all(federation, kind.all_options(len(data)), first, last)


def _fedms(federation: Federation, options: Mapping[str, Any], first: int, last: int) -> tuple[Clients, dict[str, float]]:
    """Plain LoRAs, whose mean is the global expert; then local experts and gates, which all have the mean of."""
    plain = federation.clients("mola", **options, **ONE)
    for _ in range(ROUNDS):
        federation.learn(plain, first)
        _average(plain, experts=(0,))
    in_common = next(iter(plain.values()))
    num_shared, exchanged = num_parameters(in_common), in_common.expert(0)
    for client in plain.values():
        client.close()
    clients = federation.clients("fedms", **options)
    for client in clients.values():
        put_expert(client, 0, exchanged)
    for _ in range(ROUNDS):
        last_loss = federation.learn(clients, last)
        _average(clients, gates=True)
    return clients, _notes(clients, num_shared, last_loss)


def _pfedlora(federation: Federation, options: Mapping[str, Any], first: int, last: int) -> tuple[Clients, dict[str, float]]:
    """In each round the local expert learns, then the shared one, which all have the mean of."""
    clients, num_shared = federation.clients("pfedlora", **options), 0
    for _ in range(ROUNDS):
        last_loss = federation.learn(clients, last)
        clients = {task: with_options(client, phase="shared") for task, client in clients.items()}
        num_shared = num_parameters(next(iter(clients.values())))
        federation.learn(clients, first)
        _average(clients, experts=(0,))
        clients = {task: with_options(client, phase="local") for task, client in clients.items()}
    return clients, _notes(clients, num_shared, last_loss)


def _notes(clients: Clients, num_shared: int, last_loss: float) -> dict[str, float]:
    return {"last_loss": round(last_loss, 4), "parameters": num_shared + sum(map(num_parameters, clients.values()))}


def _average(clients: Clients, **exchanged: Any) -> None:
    federated_average(list(clients.values()), [1.0] * len(clients), **exchanged)
