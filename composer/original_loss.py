"""The loss of LoraHub as its authors coded it (lorahub/algorithm.py), traps and all, for comparisons with their results.

`ExampleLoss` is the textbook form of the same: the mean over examples, and the L1 term at its face value.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from loraweave.composer.batches import IGNORED, TargetBatch, batch, encode, token_losses
from loraweave.composer.composer import Composer
from loraweave.composer.penalty import LORAHUB_L1
from loraweave.errors import WeightingError
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Task


class OriginalLoss:
    """An objective: the sum over batches of the mean token loss, divided by the number of examples, plus 0.05 * mean|w|.

    The sum should have been divided by the number of batches. With one batch of n examples, the default as in the authors'
    code, this is the mean loss of all target tokens divided by n, so that the L1 term weighs n times what it says; with one
    example a batch it is the mean over examples. A and B are summed apart, `factor_sum`, so that w and -w are the same.
    Raises WeightingError for a batch without examples.
    """

    merge_method = "factor_sum"

    def __init__(self, engine: Composer, tokenizer: Any, task: Task, *, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise WeightingError(f"batch_size is {batch_size!r}; a batch has at least 1 example, or None for all of them")
        self.engine = engine
        self.num_examples = len(task.examples)
        prompts = [task.prompt(text) for text, _ in task.examples]
        rows = encode(engine.model, tokenizer, prompts, [target for _, target in task.examples])
        size = batch_size or len(rows)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._batches = [batch(engine.model, tokenizer, part) for part in parts]

    def __call__(self, candidates: Sequence[MixtureWeights]) -> list[float]:
        return [self._loss(candidate) for candidate in candidates]

    @torch.no_grad()
    def _loss(self, candidate: MixtureWeights) -> float:
        weights = {name: weight for name, weight in candidate.as_dict().items() if weight}
        with self.engine.fused(weights, method=self.merge_method) if weights else nullcontext():
            means = [_mean_token_loss(self.engine.model, part) for part in self._batches]
        return sum(means) / self.num_examples + LORAHUB_L1 * float(candidate.values_BTLE.abs().mean())


def _mean_token_loss(model: Any, part: TargetBatch) -> float:
    return float(token_losses(model, part).sum()) / int((part.targets_BK != IGNORED).sum())
