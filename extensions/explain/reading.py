"""Which adapter counts for which token? One forward over a text, with the weights that every layer used recorded."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from loraweave import Composer, Composition, CompositionError
from loraweave.extend import Prompt
from loraweave.extend.live import Trace, UsedLayer
from loraweave.extend.routing import has_two_sequences, prompted
from loraweave.extend.scoring import encode_texts, generation_call, read_prompt
from loraweave.extensions.explain.explanation import Explanation

# a text, or a conversation: a list of {"role", "content"}
Question = Prompt | Sequence[Mapping[str, Any]]


def explain(engine: Composer | Composition, text: Question, mixture: Any = None, *, max_new_tokens: int = 0) -> Explanation:
    """Return the weight of each expert for each token of a text or conversation in each layer, from one forward.

    `mixture` is what `engine.activate` takes; None explains what is active. For a Composition, which has a mixture, `text`
    is an input of its task, and its prompt is explained. With `max_new_tokens`, the greedy continuation (an
    encoder-decoder's answer) is explained too, except its last token, which the model never reads. An encoder-decoder's
    tokens are those of the text and then those of the answer, beginning with its start token.
    Raises CompositionError without a tokenizer, ScopeError for a mixture of several rows or a composition whose parts answer
    apart, AlreadyActive while fused.
    """
    try:
        prompt = read_prompt(text, 0)
    except CompositionError as error:
        raise CompositionError(f"explain() takes one text or conversation at a time: {error}") from error
    if isinstance(engine, Composition):
        if mixture is not None:
            raise CompositionError("a composition has its mixture: explain another one with its engine, composition.engine")
        return _explain_composition(engine, engine.task.prompt(prompt), max_new_tokens)
    if engine.tokenizer is None:
        raise CompositionError("explain() needs a tokenizer: make the Composer with tokenizer=...")
    recorded = engine.record()
    with torch.no_grad(), nullcontext() if mixture is None else engine.activate(mixture):
        read = plan_reading(engine.model, engine.tokenizer, prompt, max_new_tokens)
        with recorded as trace, read.prompted():
            engine.model(**read.inputs)
    order = [name for name, _ in engine.model.named_modules() if name in engine.target_layers]
    if not order and engine.target_layers:
        raise CompositionError(
            "explain() shows layers that meet all tokens in their order, and the pool updates only experts of fused "
            "parameters: record() has their weights"
        )
    return read.explanation(engine.tokenizer, trace, order)


def _explain_composition(composition: Composition, prompt: Prompt, max_new_tokens: int) -> Explanation:
    if composition.is_base:
        with torch.no_grad():
            read = plan_reading(composition.model, composition.tokenizer, prompt, max_new_tokens)
        ids = torch.cat(read.parts).tolist()
        return Explanation(split_text(composition.tokenizer, ids), (), (), torch.empty(len(ids), 0, 0))
    if composition.router is not None:
        return explain(composition.engine, prompt, composition.router, max_new_tokens=max_new_tokens)
    adapter = composition.adapter
    engine = Composer(composition.model, [adapter], tokenizer=composition.tokenizer)
    merged = explain(engine, prompt, {adapter.name: 1.0}, max_new_tokens=max_new_tokens)
    if composition.tuned_steps:
        # a composition whose adapter was trained further has no experts to compare
        return merged
    means, by_layer = composition.mean_weights, composition.by_layer
    rows = [means if by_layer is None else by_layer.get(layer, {}) for layer in merged.layers]
    weights_LE = torch.tensor([[float(row.get(name, 0.0)) for name in means] for row in rows])
    return replace(merged, experts=tuple(means), w_TLE=merged.w_TLE * weights_LE)


# the replacement character, which part of a character decodes to
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class Reading:
    """The arguments of one forward, and its token ids in `parts`: the text, and for an encoder-decoder its answer.

    `lengths` has, for each part, the number of tokens that layers are called with, which differ to tell the calls apart. The
    first `num_prompt` tokens are the text.
    """

    inputs: Mapping[str, Tensor]
    parts: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    num_prompt: int

    def prompted(self) -> AbstractContextManager[None]:
        """Return a context for the forward, in which the text counts as the prompt and later tokens as its answer."""
        prompt_BT = self.inputs["attention_mask"].clone()
        prompt_BT[:, self.num_prompt :] = 0
        return prompted(self.inputs["input_ids"], prompt_BT)

    def explanation(self, tokenizer: Any, trace: Trace, layers: Sequence[str]) -> Explanation:
        """Return the weights of the traced forward as an Explanation of these layers, in this order."""
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
        return Explanation(split_text(tokenizer, torch.cat(self.parts).tolist()), tuple(layers), trace.experts, w_TLE)


def plan_reading(model: nn.Module, tokenizer: Any, text: Prompt, max_new_tokens: int) -> Reading:
    """Return the arguments of a forward over the text and all but the last token of its greedy continuation."""
    inputs, pad = encode_texts(model, tokenizer, [text])
    text_ids = inputs["input_ids"][0]
    answer_ids = text_ids[:0]
    if max_new_tokens:
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        call = generation_call(model, tokenizer, [text], None, settings)
        answer_ids = call.new_tokens(call.output(model))[0, :-1]
    if not has_two_sequences(model):
        ids = torch.cat([text_ids, answer_ids])
        return Reading(
            {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}, (ids,), (len(ids),), len(text_ids)
        )
    if not max_new_tokens:
        answer_ids = torch.full_like(text_ids[:1], _start_token(model))
    decoded = answer_ids
    if len(decoded) == len(text_ids):
        # one more token, which changes no earlier one, so that the length of a call tells its part
        decoded = torch.cat([decoded, torch.full_like(decoded[:1], pad)])
    return Reading(
        {**inputs, "decoder_input_ids": decoded[None]}, (text_ids, answer_ids), (len(text_ids), len(decoded)), len(text_ids)
    )


def split_text(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token. Tokens that only together make a character each get the text of all of them."""
    texts: list[str] = []
    begin = 0
    while begin < len(ids):
        end = begin + 1
        text = _decode(tokenizer, ids[begin:end])
        # no character has more bytes than four
        while BROKEN in text and end < min(begin + 4, len(ids)):
            end += 1
            text = _decode(tokenizer, ids[begin:end])
        if BROKEN in text:
            end, text = begin + 1, _decode(tokenizer, ids[begin : begin + 1])
        texts += [text] * (end - begin)
        begin = end
    return tuple(texts)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _mean_over_calls(calls: Sequence[UsedLayer], length: int, *, only: bool) -> Tensor | None:
    """Return a layer's weights w_TE for the text of `length` tokens, a mean over its calls; None without such a call.

    With `only` (the model reads no other text) a call with some tokens alone counts if they share weights.
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
        token = getattr(settings, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise CompositionError(
        f"{type(model).__name__} names no token that its answers begin with: pass max_new_tokens, or set "
        "model.config.decoder_start_token_id"
    )
