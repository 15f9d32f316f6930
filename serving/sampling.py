"""The choice of a row's next token, and the end of its text at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from loraweave.errors import CompositionError

# lower temperatures are greedy: scores divided by them leave fp32
LEAST_TEMPERATURE = 1e-3
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Sampling:
    """The sampling of an answer. Temperature 0 is greedy; `logprobs` is the number of alternatives told, None for none.

    With a seed, the draws are those that transformers makes for the prompt alone after `torch.manual_seed(seed)`.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Chosen:
    """A token and its log-probability under the model, before temperature; `top` has the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Chosen:
    """Choose the next token. Raises CompositionError for logits that are not finite."""
    scores_V = logits_V.float()
    # NaN and infinity both reach the maximum
    if not bool(torch.isfinite(scores_V.max())):
        raise CompositionError(
            "the model's logits are not finite: this mixture's updates overflow the model's precision; use smaller weights"
        )
    if sampling.temperature < LEAST_TEMPERATURE:
        token = int(scores_V.argmax())
    else:
        scores_1V = scores_V[None] / sampling.temperature
        if sampling.top_p < 1:
            scores_1V = TopPLogitsWarper(sampling.top_p)(None, scores_1V)
        token = int(torch.multinomial(scores_1V.softmax(dim=-1), 1, generator=generator))
    if sampling.logprobs is None:
        return Chosen(token)
    # JSON has no infinity
    logprobs_V = scores_V.log_softmax(dim=-1).clamp(min=LEAST_LOGPROB)
    values, tokens = logprobs_V.topk(min(sampling.logprobs, len(logprobs_V)))
    return Chosen(token, float(logprobs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


class Stops:
    """A filter of text up to the first complete stop string; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return (text that may be told, whether a stop string was found)."""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        begun = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        told = len(text) - max(begun, default=0)
        self._held = text[told:]
        return text[:told], False

    def rest(self) -> str:
        """Return the text held back, for when nothing more comes."""
        return self._held
