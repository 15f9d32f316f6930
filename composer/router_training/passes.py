"""Which rows a step has, a function of the seed and the step alone, and what each pass of them counts in the step's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.batches import TargetBatch, batch
from loraweave.composer.router_training.rows import TrainingRow
from loraweave.composer.training.seeding import seeded

# padding is masked, so any token will do where there is no tokenizer
NO_TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0)


@dataclass(frozen=True)
class Stream:
    """Rows in epochs of shuffled order; `key` tells a stream from the others of one training."""

    rows: Sequence[TrainingRow]
    seed: int
    key: str

    def at(self, step: int, count: int) -> list[TrainingRow]:
        """The `count` rows of one step."""
        chosen: list[TrainingRow] = []
        orders: dict[int, list[int]] = {}
        for place in range(step * count, (step + 1) * count):
            epoch, offset = divmod(place, len(self.rows))
            if epoch not in orders:
                orders[epoch] = torch.randperm(len(self.rows), generator=seeded(self.seed, self.key, epoch)).tolist()
            chosen.append(self.rows[orders[epoch][offset]])
        return chosen


def streams(rows: Sequence[TrainingRow], experts: Sequence[str], seed: int, *, apart: bool) -> list[Stream]:
    """One stream of all rows; or one for each expert with rows, which does not depend on what other experts there are."""
    if not apart:
        return [Stream(rows, seed, "rows")]
    by_expert: dict[int, list[TrainingRow]] = {}
    for row in rows:
        by_expert.setdefault(row.expert, []).append(row)
    return [Stream(by_expert[place], seed, experts[place]) for place in sorted(by_expert)]


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model together.

    The step's loss is the sum over passes of sum over b and k of per_token_B * loss_BK, plus `share` times the pass's terms.
    """

    rows: Sequence[TrainingRow]
    per_token_B: Tensor
    share: float


def passes(groups: Sequence[Sequence[TrainingRow]], num_passes: int) -> list[Pass]:
    """The rows of a step, those of similar length together; each group counts with the mean over its target tokens."""
    weighted = []
    for group in groups:
        per_token = 1.0 / sum(row.num_targets for row in group)
        weighted += [(row, per_token) for row in group]
    # stable: equal lengths keep the order in which they were drawn
    weighted.sort(key=lambda pair: len(pair[0]))
    size = -(-len(weighted) // num_passes)
    parts = [weighted[start : start + size] for start in range(0, len(weighted), size)]
    return [Pass([row for row, _ in part], torch.tensor([share for _, share in part]), 1 / len(parts)) for part in parts]


def target_batch(model: Any, tokenizer: Any, rows: Sequence[TrainingRow]) -> TargetBatch:
    """The rows as one batch on the model's device, with loss only where their labels ask for it."""
    made = batch(model, NO_TOKENIZER if tokenizer is None else tokenizer, [row.encoded for row in rows])
    for index, row in enumerate(rows):
        if row.labels is not row.encoded.target:
            width, count = made.targets_BK.shape[1], len(row.labels)
            start = 0 if model.config.is_encoder_decoder else width - count
            made.targets_BK[index, start : start + count] = torch.tensor(row.labels, device=made.targets_BK.device)
    return made
