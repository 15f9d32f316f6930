"""The loss of mixtures on a few examples: whole populations of candidates in one forward pass, a mixture per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loraweave.composer.batches import IGNORED, batch, encode, token_scores
from loraweave.composer.composer import Composer
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Task

# rows of one forward pass times their target width: bounds the logits over the vocabulary that are held at once
MAX_LOGITS = 768
REGULARISATION = 0.05


class ExampleLoss:
    """An objective: mean over the examples of the mean loss of their target tokens, plus `l1` * mean|w|.

    The L1 term is LoraHub's with its published 0.05. `merge_method` says what weights mean: "linear" is the sum of deltas,
    run live with one mixture a row; any other name is merged and written into the base for each candidate. `only` restricts
    the loss to some examples, by index.
    """

    def __init__(
        self,
        engine: Composer,
        tokenizer: Any,
        task: Task,
        *,
        merge_method: str = "linear",
        l1: float = REGULARISATION,
        only: Sequence[int] | None = None,
    ) -> None:
        self.engine = engine
        self.merge_method = merge_method
        self.l1 = l1
        self.only = list(range(len(task.examples)) if only is None else only)
        prompts = [task.prompt(text) for text, _ in task.examples]
        rows = encode(engine.model, tokenizer, prompts, [target for _, target in task.examples])
        self._batch = batch(engine.model, tokenizer, [rows[index] for index in self.only])

    def __call__(self, candidates: Sequence[MixtureWeights]) -> list[float]:
        losses_CN, _ = self.scores(candidates)
        penalties = [self.l1 * float(candidate.values_BTLE.abs().mean()) for candidate in candidates]
        return [float(losses.mean()) + penalty for losses, penalty in zip(losses_CN, penalties, strict=True)]

    @torch.no_grad()
    def scores(self, candidates: Sequence[MixtureWeights]) -> tuple[np.ndarray, np.ndarray]:
        """(loss_CN, hit_CN) of every candidate on every example, without the L1 term.

        A hit is an example whose target tokens are each the most likely one, so that greedy decoding would write it.
        """
        if self.merge_method != "linear":
            parts = [self._merged(candidate) for candidate in candidates]
        else:
            per_pass = max(1, MAX_LOGITS // self._batch.targets_BK.numel())
            parts = [self._live(candidates[start : start + per_pass]) for start in range(0, len(candidates), per_pass)]
        losses, hits = zip(*parts, strict=True)
        return np.concatenate(losses), np.concatenate(hits)

    def _live(self, candidates: Sequence[MixtureWeights]) -> tuple[np.ndarray, np.ndarray]:
        count, num_rows = len(candidates), len(self.only)
        repeated = self._batch.tiled(count)
        values_CTLE = torch.cat([candidate.values_BTLE for candidate in candidates])
        weights = MixtureWeights(values_CTLE, candidates[0].experts)
        # candidate c owns rows c * num_rows to (c + 1) * num_rows, the order in which live mixing expands rows
        with self.engine.activate(weights):
            losses_BK, hits_BK = token_scores(self.engine.model, repeated)
        return self._per_example(losses_BK, hits_BK, repeated.targets_BK, (count, num_rows))

    def _merged(self, candidate: MixtureWeights) -> tuple[np.ndarray, np.ndarray]:
        weights = {name: value for name, value in candidate.as_dict().items() if value}
        if not weights:
            losses_BK, hits_BK = token_scores(self.engine.model, self._batch)
        else:
            with self.engine.fused(weights, method=self.merge_method):
                losses_BK, hits_BK = token_scores(self.engine.model, self._batch)
        return self._per_example(losses_BK, hits_BK, self._batch.targets_BK, (1, len(self.only)))

    @staticmethod
    def _per_example(
        losses_BK: torch.Tensor, hits_BK: torch.Tensor, targets_BK: torch.Tensor, shape: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        real_BK = targets_BK != IGNORED
        loss_B = losses_BK.sum(dim=1) / real_BK.sum(dim=1)
        hit_B = (hits_BK | ~real_BK).all(dim=1)
        return loss_B.double().cpu().view(shape).numpy(), hit_B.cpu().view(shape).numpy()
