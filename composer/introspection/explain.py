"""Gathers an Explanation: what the model reads of a text, and where in it each layer's weights belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.generation.call import encode, encodes, generation_call
from loraweave.composer.introspection.explanation import Explanation
from loraweave.composer.introspection.recording import Trace
from loraweave.composer.introspection.used_weights import UsedLayer
from loraweave.errors import CompositionError
from loraweave.routers.routing.prompts import prompted

# what a token decodes to that is no whole character
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class Reading:
    """The arguments of one forward, and the token ids in it: of the text, and for an encoder-decoder of its answer.

    `lengths` are how many tokens a layer is called with for each part, which never are the same for two. The first
    `num_prompt` tokens are the text.
    """

    inputs: Mapping[str, Tensor]
    parts: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    num_prompt: int

    def prompted(self) -> AbstractContextManager[None]:
        """For the forward: says that the text is a prompt, and what follows is its answer."""
        prompt_BT = self.inputs["attention_mask"].clone()
        prompt_BT[:, self.num_prompt :] = 0
        return prompted(self.inputs["input_ids"], prompt_BT)

    def explanation(self, tokenizer: Any, trace: Trace, layers: Sequence[str]) -> Explanation:
        """The traced forward as an Explanation of the layers, in this order."""
        num_tokens = sum(map(len, self.parts))
        w_TLE = torch.full((num_tokens, len(layers), len(trace.experts)), torch.nan)
        for at, layer in enumerate(layers):
            calls = trace.calls(layer)
            begin = 0
            for part, length in zip(self.parts, self.lengths, strict=True):
                w_TE = _mean_over_calls(calls, length, only=len(self.parts) == 1)
                if w_TE is not None:
                    w_TLE[begin : begin + len(part), at] = w_TE[: len(part)].float().cpu()
                begin += len(part)
        return Explanation(pieces(tokenizer, torch.cat(self.parts).tolist()), tuple(layers), trace.experts, w_TLE)


def reading(model: nn.Module, tokenizer: Any, text: str, max_new_tokens: int) -> Reading:
    """One forward over the text, and over all but the last of the tokens of its greedy continuation."""
    inputs, pad = encode(model, tokenizer, [text])
    text_ids = inputs["input_ids"][0]
    answer_ids = text_ids[:0]
    if max_new_tokens:
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        call = generation_call(model, tokenizer, [text], None, settings)
        output = call.output(model)
        answer_ids = (output if isinstance(output, Tensor) else output.sequences)[0, call.start : -1]
    if not encodes(model):
        ids = torch.cat([text_ids, answer_ids])
        return Reading(
            {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}, (ids,), (len(ids),), len(text_ids)
        )
    if not max_new_tokens:
        answer_ids = torch.full_like(text_ids[:1], _start_token(model))
    given = answer_ids
    if len(given) == len(text_ids):
        # one more, which changes none before it, so that the length of a call says which part it saw
        given = torch.cat([given, torch.full_like(given[:1], pad)])
    return Reading(
        {**inputs, "decoder_input_ids": given[None]}, (text_ids, answer_ids), (len(text_ids), len(given)), len(text_ids)
    )


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token. Tokens that only together are characters get all the text that they are together."""
    found: list[str] = []
    begin = 0
    while begin < len(ids):
        end = begin + 1
        text = _decoded(tokenizer, ids[begin:end])
        # no character has more bytes than four
        while BROKEN in text and end < min(begin + 4, len(ids)):
            end += 1
            text = _decoded(tokenizer, ids[begin:end])
        if BROKEN in text:
            end, text = begin + 1, _decoded(tokenizer, ids[begin : begin + 1])
        found += [text] * (end - begin)
        begin = end
    return tuple(found)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _mean_over_calls(calls: Sequence[UsedLayer], length: int, *, only: bool) -> Tensor | None:
    """w_TE of a layer for the part of this length, the mean where it was called several times; None where it saw none.

    A layer that got some of the tokens only (an expert of the base's own) is known where all tokens share its weights.
    """
    seen = []
    for call in calls:
        num_tokens = call.num_rows * call.num_tokens
        if num_tokens == length or (only and num_tokens and num_tokens % length == 0):
            seen.append(call.spread_BTE.reshape(-1, length, call.w_BTE.shape[2]))
        elif only and call.w_BTE.shape[:2] == (1, 1):
            seen.append(call.w_BTE.expand(1, length, -1))
    return torch.cat(seen).mean(dim=0) if seen else None


def _start_token(model: Any) -> int:
    for settings in (getattr(model, "generation_config", None), model.config):
        found = getattr(settings, "decoder_start_token_id", None)
        if found is not None:
            return int(found)
    raise CompositionError(
        f"{type(model).__name__} names no token that its answers begin with: pass max_new_tokens, or set "
        "model.config.decoder_start_token_id"
    )
