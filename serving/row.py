"""An answer on its way: its sampling, and its tokens and text so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from loraweave.composer.model.generate import GrowingText
from loraweave.composer.model.scoring import log_average
from loraweave.errors import CompositionError
from loraweave.serving.limits import Refusal
from loraweave.serving.names import Served

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
        # the text held back, which is told when nothing more comes
        self.rest = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return (text that may be told, whether a stop string was found)."""
        text = self.rest + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.rest = ""
            return text[: min(places)], True
        begun = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        told = len(text) - max(begun, default=0)
        self.rest = text[told:]
        return text[:told], False


@dataclass(frozen=True)
class Piece:
    """The part of an answer by one step: text, the tokens if log-probabilities are asked for, and why it ended.

    `finish` is "stop" (an end of sequence or a stop string), "length", or None while it goes on.
    """

    text: str
    chosen: tuple[Chosen, ...] = ()
    finish: str | None = None


class Row:
    """A prompt for each member of one composition, all of which go on with the same tokens.

    The scheduler's thread alone changes it, but for `gone`, which the client's side sets. `tell` gets each Piece, or the
    exception that ends the row. `deadline` is a time of `time.monotonic`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        served: Served,
        sampling: Sampling,
        tell: Callable[[Piece | BaseException], None],
        *,
        deadline: float = float("inf"),
    ) -> None:
        self.prompts = list(map(tuple, prompts))
        self.served = served
        self.sampling = sampling
        self.deadline = deadline
        # the most tokens that a member has when the row ends
        self.longest = max(map(len, prompts)) + sampling.max_tokens
        self.tokens: list[int] = []
        self.over = False
        self.gone = False
        self.failed = False
        # tokens of the prompts that were not read, since their keys and values were there
        self.num_kept = 0
        # whether the model failed on a batch with this row in it, and whether its experts were given back
        self.suspect = False
        self.released = False
        # how many rows that came later began before it
        self.passed = 0
        self._tell = tell
        self._stops = Stops(sampling.stop)
        self._text: GrowingText
        self._generator: torch.Generator | None = None

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """The tokens of each member so far, its prompt's among them."""
        return [prompt + tuple(self.tokens) for prompt in self.prompts]

    @property
    def batch(self) -> Hashable:
        """The key of the row's batch, which equal rows share: None without a router, one for a router, or the row alone."""
        if self.served.router is None:
            return None
        return self if self.served.members[0].is_alone else self.served.identity

    def asks_like(self, other: Row) -> bool:
        """Return whether both have the same prompts under the same weights."""
        return self.served is other.served and self.prompts == other.prompts

    def take(self, logits_MV: Tensor, tokenizer: Any, ends: Collection[int]) -> None:
        """Choose the next token from the members' logits and tell it; `ends` are the tokens that end a sequence.

        What goes wrong with this row ends this row alone.
        """
        try:
            if self._generator is None:
                self._text = GrowingText(tokenizer)
                self._generator = torch.Generator(logits_MV.device)
                seed = self.sampling.seed
                self._generator.manual_seed(self._generator.seed() if seed is None else seed)
            scores_V = logits_MV[0]
            if len(logits_MV) > 1:
                # scores whose softmax is the average of the members' probabilities
                share_M = torch.tensor([member.share for member in self.served.members])
                exact_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
                scores_V = log_average(exact_MV.log_softmax(dim=-1)[:, None], share_M)[0]
            chosen = choose(scores_V, self.sampling, self._generator)
            self.tokens.append(chosen.token)
            ended, full = chosen.token in ends, len(self.tokens) >= self.sampling.max_tokens
            text, stopped = self._stops.add("" if ended else self._text.text([chosen.token]))
            if (ended or full) and not stopped:
                rest, stopped = self._stops.add(self._text.rest())
                text += rest if stopped else rest + self._stops.rest
            self.over = ended or full or stopped
            finish = None if not self.over else "stop" if ended or stopped else "length"
            self._tell(Piece(text, () if ended or self.sampling.logprobs is None else (chosen,), finish))
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the row with an error."""
        self.over = self.failed = True
        self._tell(error)

    def require_wanted(self) -> None:
        """End the row if its client has gone or its time is up."""
        if self.gone:
            self.over = True
        elif not self.over and time.monotonic() > self.deadline:
            self.fail(Refusal(504, f"the deadline passed after {len(self.tokens)} tokens", code="deadline_exceeded"))
