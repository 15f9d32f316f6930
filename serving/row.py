"""One answer on its way: its prompts, its tokens so far, and the client that is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.model.generate import GrowingText
from loraweave.composer.model.scoring import log_average
from loraweave.serving.refusals import Refusal
from loraweave.serving.sampling import Chosen, Sampling, Stops, choose
from loraweave.serving.served import Served


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
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.served = served
        self.sampling = sampling
        self.deadline = deadline
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
        self._text: GrowingText | None = None
        self._generator: torch.Generator | None = None

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """The tokens of each member so far, its prompt's among them."""
        return [prompt + tuple(self.tokens) for prompt in self.prompts]

    @property
    def longest(self) -> int:
        """The most tokens that a member has when the row ends."""
        return max(map(len, self.prompts)) + self.sampling.max_tokens

    @property
    def batch(self) -> Hashable:
        """The key of the row's batch, which equal rows share: None without a router, one for a router, or the row alone."""
        router = self.served.router
        if router is None:
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
            chosen = choose(self._average(logits_MV), self.sampling, self._generator_on(logits_MV.device))
            self.tokens.append(chosen.token)
            self._tell(self._piece(chosen, tokenizer, ends))
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

    def _average(self, logits_MV: Tensor) -> Tensor:
        """Return scores whose softmax is the average of the members' probabilities."""
        if len(logits_MV) == 1:
            return logits_MV[0]
        share_M = torch.tensor([member.share for member in self.served.members])
        exact_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
        return log_average(exact_MV.log_softmax(dim=-1)[:, None], share_M)[0]

    def _piece(self, chosen: Chosen, tokenizer: Any, ends: Collection[int]) -> Piece:
        told = () if self.sampling.logprobs is None else (chosen,)
        growing = self._text = self._text or GrowingText(tokenizer)
        ended = chosen.token in ends
        full = len(self.tokens) >= self.sampling.max_tokens
        text, stopped = self._stops.add("" if ended else growing.text([chosen.token]))
        if (ended or full) and not stopped:
            rest, stopped = self._stops.add(growing.rest())
            text += rest if stopped else rest + self._stops.rest()
        self.over = ended or full or stopped
        finish = None if not self.over else "stop" if ended or stopped else "length"
        return Piece(text, () if ended else told, finish)

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        return self._generator
