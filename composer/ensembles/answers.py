"""Answers of an ensemble to the inputs of a task: labels ranked, or text decoded, by averaged probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loraweave.common.rows import GivenRows, read_inputs
from loraweave.composer import scoring
from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.ensemble import ensemble
from loraweave.composer.ensembles.member_passes import known_members, member_weights
from loraweave.errors import CompositionError
from loraweave.types import Task


def answers(
    engine: Composer,
    mixtures: Sequence[Any],
    task: Task,
    inputs: GivenRows,
    *,
    weights: Sequence[float] | None = None,
    max_new_tokens: int = scoring.MAX_NEW_TOKENS,
) -> list[str]:
    """One answer for each input: the label of the highest averaged probability, else the first greedily decoded line.

    Decoding takes at each step the token of the highest average of the members' probabilities, which all of them then go
    on from: p(y) is the product of these averages. Members run as rows of one batch with a cache of keys and values.
    `mixtures` and `weights` are those of `ensemble`; raises what it raises, CompositionError without a tokenizer, and
    InvalidTask for inputs that are no texts and no rows.
    """
    members = known_members(engine, mixtures)
    weight_M = member_weights(weights, len(members))
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise CompositionError("answers() need a tokenizer: make the Composer with tokenizer=...")
    model, labels, shares = engine.model, task.labels, weight_M.tolist()

    def rank(prompts: Sequence[str]) -> list[str]:
        return ensemble(engine, members, scoring.padded(model, tokenizer, prompts), weights=shares, labels=labels).best  # type: ignore[return-value]

    def decode(prompts: Sequence[str]) -> list[str]:
        with torch.no_grad(), engine.activate(members):
            found = scoring.generate(
                model,
                tokenizer,
                list(prompts) * len(members),
                max_new_tokens=max_new_tokens,
                processors=[AveragedScores(weight_M)],
            )
        return found[: len(prompts)]

    prompts = [task.prompt(text) for text in read_inputs(inputs)]
    size = max(1, scoring.BATCH_SIZE // len(members)) if labels is None else scoring.BATCH_SIZE
    return scoring.by_length(tokenizer, prompts, size, decode if labels is None else rank)


class AveragedScores:
    """A logits processor for greedy decoding: log of the members' averaged probabilities, the same for each member's row.

    The rows of a batch are those of the first member, then those of the next. weight_M sums to 1.
    """

    def __init__(self, weight_M: Tensor) -> None:
        self.weight_M = weight_M

    def __call__(self, ids_NT: Tensor, scores_NV: Tensor) -> Tensor:
        scores_MBV = scores_NV.to(torch.promote_types(scores_NV.dtype, torch.float32)).log_softmax(dim=-1)
        scores_MBV = scores_MBV.view(len(self.weight_M), -1, scores_NV.shape[-1])
        log_weight_M = self.weight_M.to(scores_MBV).log()
        average_BV = torch.logsumexp(scores_MBV + log_weight_M[:, None, None], dim=0)
        return average_BV.repeat(len(self.weight_M), 1)
