"""The change that quantising again makes to answers, against the same base with every update live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraweave import CompositionError
from loraweave.extend import Fused


@dataclass(frozen=True)
class LogitsLoss:
    """The change of answers over all tokens of some texts.

    `kl` is the mean of KL(exact || fused) in nats, `other_choice` the share of tokens with another likeliest successor, and
    `largest` the largest difference of two log-probabilities.
    """

    kl: float
    other_choice: float
    largest: float


@torch.inference_mode()
def logits_loss(written: Fused, tokenizer: Any, texts: Sequence[str]) -> LogitsLoss:
    """Return how far the logits of these texts, each read alone, are from those with every quantised layer's update live.

    `written` is what `Composer.fused` gives its block. Raises CompositionError where there are no tokens to read, and after
    the block's end.
    """
    kl = other = count = largest = 0.0
    model = written.model
    device = next(model.parameters()).device
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt").to(device)
        with written.exact():
            exact = model(**inputs).logits.float().log_softmax(dim=-1)
        fused = model(**inputs).logits.float().log_softmax(dim=-1)
        kl += float((exact.exp() * (exact - fused)).sum())
        other += float((exact.argmax(dim=-1) != fused.argmax(dim=-1)).sum())
        count += exact.shape[:-1].numel()
        largest = max(largest, float((exact - fused).abs().max()))
    if not count:
        raise CompositionError("logits_loss() needs a text of at least one token")
    return LogitsLoss(kl / count, other / count, largest)
