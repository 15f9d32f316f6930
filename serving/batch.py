"""Rows, which are answers being generated, and the running batch: each step gives each row a token, under its own mixture.

    read(rows)    the prompts' new tokens, padded on the left -> the model -> first tokens; keys and values join
                  those that are there
    step()        the last token of every row -> the model -> one token more for each
    keep(rows)    the others leave, with their keys and values and the columns that only they filled

A row has a line for each member of its composition, and all of them go on with its tokens:

    columns       0 ........................... W-1
    line 0        .  .  .  p  p  p  p  t  t  t        mask_BW is 0 where a line is empty (.): attention gives it
    line 1        p  p  p  p  p  p  p  p  t  t        weight 0, so that an answer is the same as alone

Why not the paged cache of transformers' own manager: that packs all rows into one, and mixtures follow rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import TopPLogitsWarper

from loraweave.composer.model.batches import cache_name, end_tokens, is_plain, last_logits, pad_rows, takes, with_positions
from loraweave.composer.model.generate import GrowingText
from loraweave.composer.model.scoring import log_average
from loraweave.errors import CompositionError
from loraweave.routers.tokens._call import prompted
from loraweave.serving.limits import Refusal
from loraweave.serving.memory import Experts
from loraweave.serving.names import Served

# lower temperatures are greedy: scores divided by them leave fp32
LEAST_TEMPERATURE = 1e-3
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Sampling:
    """The sampling of an answer. Temperature 0 is greedy; `logprobs` is the number of likeliest tokens to return, or None.

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
    """A filter that passes text up to the first stop string, and holds back text that may begin a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        # the text held back, which is passed on at the end of the answer
        self.rest = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return (text that can be passed on, True if a stop string was found)."""
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
    """The part of an answer that one step adds: text, the tokens if log-probabilities are requested, and why it ended.

    `finish` is "stop" (an end of sequence or a stop string), "length", or None while it goes on.
    """

    text: str
    chosen: tuple[Chosen, ...] = ()
    finish: str | None = None


class Row:
    """An answer being generated: a prompt for each member of one composition, all continued by the same tokens.

    The scheduler's thread alone changes a row, but for `gone`, set when the client leaves. `tell` gets each Piece, or the
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
        # the most tokens that a member's line may have when the row ends
        self.longest = max(map(len, prompts)) + sampling.max_tokens
        self.tokens: list[int] = []
        self.over = False
        self.gone = False
        self.failed = False
        # tokens of the prompts that were not read, since their keys and values were there
        self.num_kept = 0
        # whether the model failed on a batch with this row in it, and whether its adapters are reserved for it
        self.suspect = False
        self.held = False
        # times by `time.monotonic`: of its making, of leaving the queue, and of its first and last token
        self.made = time.monotonic()
        self.begun = self.first = self.last = math.nan
        # how many rows that came later began before it
        self.passed = 0
        self._tell = tell
        self._stops = Stops(sampling.stop)
        self._text: GrowingText
        self._generator: torch.Generator | None = None

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """The token ids of each member so far: its prompt and the new tokens."""
        return [prompt + tuple(self.tokens) for prompt in self.prompts]

    @property
    def batch(self) -> Hashable:
        """The key of the row's batch: None without a router, else the composition's identity, or the row if it is alone."""
        if self.served.router is None:
            return None
        return self if self.served.is_alone else self.served.identity

    def asks_like(self, other: Row) -> bool:
        """Return True if both rows have the same prompts and the same composition."""
        return self.served is other.served and self.prompts == other.prompts

    def take(self, logits_MV: Tensor, tokenizer: Any, ends: Collection[int]) -> None:
        """Choose the next token from the members' logits and pass it to `tell`; `ends` are the tokens that end a sequence.

        An error ends this row alone.
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
            self.last = time.monotonic()
            if len(self.tokens) == 1:
                self.first = self.last
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


class Prefixes:
    """The kept keys and values of prompts' beginnings. This class keeps none; an extension's does. One thread uses it."""

    kept_bytes = 0

    @property
    def oldest(self) -> float:
        """The last use, by `time.monotonic`, of the beginning that was used longest ago; infinity if none is kept."""
        return math.inf

    def drop_oldest(self) -> None:
        """Drop the beginning that was used longest ago."""

    def begin(self, model: Any, tokenizer: Any, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Any, Tensor]:
        """Return (the model's inputs, a cache of kept beginnings or None, mask_BW of both) for each member of each row.

        Sets `num_kept` of rows whose beginning is kept.
        """
        ids_BT, mask_BT = pad_rows(tokenizer, [line_ids for row in rows for line_ids in row.ids])
        return with_positions(model, ids_BT, mask_BT), None, mask_BT

    def compact(self, cache: Any, mask_BW: Tensor) -> Tensor:
        """Close the gaps in a cache that `begin` returned and the model has extended; return the new mask."""
        return mask_BW

    def remember(self, rows: Sequence[Row], ended: Sequence[Row], cache: Any) -> None:
        """Keep the keys and values of the `ended` ones of the batch's `rows`, except those that failed."""


class Batch:
    """The rows of one model that run together, their keys and values, and a mask of the columns that each has filled.

    A row has one line (row of the tensors) for each member. Rows with equal `Row.batch` share a batch. The beginnings that
    `prefixes` has are not read again. Raises CompositionError for a model that is not a decoder, takes no position ids, or
    keeps more than plain keys and values: rows of different ages cannot share its cache.
    """

    def __init__(self, model: Any, tokenizer: Any, experts: Experts, prefixes: Prefixes) -> None:
        if model.config.is_encoder_decoder or not takes(model, "position_ids"):
            raise CompositionError(
                f"cannot serve a {type(model).__name__}: rows of different ages need a decoder that takes position_ids"
            )
        self.rows: list[Row] = []
        self._model = model
        self._tokenizer = tokenizer
        self._experts = experts
        self._prefixes = prefixes
        ends = end_tokens(model)
        self._ends = frozenset([tokenizer.eos_token_id] if ends is None else ends) - {None}
        self._keep_last = last_logits(model)
        self._cache_name = cache_name(model)
        self._cache: Any = None
        self._mask_BW = torch.zeros(0, 0, dtype=torch.long)

    @torch.no_grad()
    def read(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows, choose a token for each row, and add the unfinished rows to the batch."""
        inputs, before, mask_BT = self._prefixes.begin(self._model, self._tokenizer, rows)
        cache = self._advance(rows, inputs, before)
        if not is_plain(cache):
            raise CompositionError(
                f"cannot serve a {type(self._model).__name__}: it keeps more than plain keys and values, or only those of a "
                "window"
            )
        mask_BT = mask_BT.to(self._model.device)
        if before is not None:
            mask_BT = self._prefixes.compact(cache, mask_BT)
        if self.rows:
            _join(self._cache, cache)
            width = max(self._mask_BW.shape[1], mask_BT.shape[1])
            mask_BT = torch.cat([pad(mask_BW, (width - mask_BW.shape[1], 0)) for mask_BW in (self._mask_BW, mask_BT)])
            cache = self._cache
        self.rows, self._cache, self._mask_BW = [*self.rows, *rows], cache, mask_BT
        self._prefixes.remember(self.rows, rows, cache)
        self.drop_ended()

    @torch.no_grad()
    def step(self) -> None:
        """Choose one more token for every row, and drop rows that are over."""
        last_B1 = torch.tensor([[row.tokens[-1]] for row in self.rows for _ in row.prompts])
        mask_BW = pad(self._mask_BW, (0, 1), value=1)
        inputs = {"input_ids": last_B1, "attention_mask": mask_BW, "position_ids": mask_BW.sum(dim=1, keepdim=True) - 1}
        self._cache = self._advance(self.rows, inputs, self._cache)
        self._mask_BW = mask_BW
        self._prefixes.remember(self.rows, [row for row in self.rows if row.over], self._cache)
        self.drop_ended()

    def drop_ended(self) -> None:
        """Drop the rows that are over, with their keys and values."""
        rows = [row for row in self.rows if not row.over]
        if not rows:
            self.clear()
        if len(rows) == len(self.rows):
            return
        kept_B = torch.tensor([not row.over for row in self.rows for _ in row.prompts], device=self._model.device)
        self.rows = rows
        mask_BW = self._mask_BW[kept_B]
        first = int(mask_BW.any(dim=0).int().argmax())
        self._mask_BW = mask_BW[:, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept_B, :, first:], layer.values[kept_B, :, first:]

    def clear(self) -> None:
        """Drop all rows."""
        self.rows, self._cache = [], None

    def _advance(self, rows: Sequence[Row], inputs: dict[str, Tensor], cache: Any) -> Any:
        """Run the model and give each row its logits; return the cache."""
        arguments: dict[str, Any] = {name: value.to(self._model.device) for name, value in inputs.items()}
        if cache is not None:
            arguments[self._cache_name] = cache
        reads = inputs["input_ids"].shape[1] > 1
        with self._experts.activate([row.served for row in rows], reads=reads), self._prompted(rows):
            output = self._model(**arguments, use_cache=True, **self._keep_last)
        first = 0
        for row in rows:
            row.take(output.logits[first : first + len(row.prompts), -1], self._tokenizer, self._ends)
            first += len(row.prompts)
        return output[self._cache_name]

    def _prompted(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Return a context in which routers know the rows' prompts."""
        for row in rows:
            if row.served.router is not None or row.served.is_activated:
                return prompted(*pad_rows(self._tokenizer, [prompt for row in rows for prompt in row.prompts]))
        return nullcontext()


def _join(cache: Any, other: Any) -> None:
    """Append another cache's rows to this one's, padding the narrower on the left; all layers change, or none."""
    joined = []
    for mine, its in zip(cache.layers, other.layers, strict=True):
        width = max(mine.keys.shape[-2], its.keys.shape[-2])
        parts = ((mine.keys, its.keys), (mine.values, its.values))
        joined.append([torch.cat([pad(states, (0, 0, width - states.shape[2], 0)) for states in part]) for part in parts])
    for layer, (keys_BHWD, values_BHWD) in zip(cache.layers, joined, strict=True):
        layer.keys, layer.values = keys_BHWD, values_BHWD
