"""How `experts` trains: rows of all tasks in turn, AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import loraweave as lw
from loraweave.composer.batches import IGNORED, EncodedRow, batch
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.labelled import called
from loraweave.composer.training.seeding import seeded

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
