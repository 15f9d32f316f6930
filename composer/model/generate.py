"""The arguments that engine.generate and engine.stream give to the model's own `generate`: prompts and checked settings.

`GrowingText` is the text of an answer while its tokens come one by one.
"""

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from loraweave.common.chat import Conversation, Prompt, is_messages, prompt_ids
from loraweave.composer.model.batches import last_logits, pad_id, pad_rows
from loraweave.errors import CompositionError, ScopeError
from loraweave.routers.tokens._call import has_two_sequences

# a text, or a conversation: a list of {"role", "content"}
Asked: TypeAlias = Prompt | Sequence[Mapping[str, Any]]

# modes whose decoding transformers downloads as code and runs
DOWNLOADED = ("contrastive_search", "dola_generation", "group_beam_search", "constrained_beam_search")


@dataclass(frozen=True, eq=False)
class GenerationCall:
    """One call of the model's `generate`: its arguments, its mode of decoding, and the index at which new tokens begin."""

    tokenizer: Any
    arguments: Mapping[str, Any]
    seeds: Sequence[int] | None
    mode: str
    start: int

    def output(self, model: Any, streamer: Any = None) -> Any:
        """Return the output of the model's `generate`; a `streamer`, if given, gets the tokens as they come."""
        arguments = dict(self.arguments) if streamer is None else {**self.arguments, "streamer": streamer}
        if self.seeds is not None:
            arguments["custom_generate"] = sample_by_seeds(self.seeds, arguments.get("streamer"))
        return model.generate(**arguments)

    def new_tokens(self, output: Any) -> Tensor:
        """Return the new tokens of every sequence that `generate` returned."""
        sequences: Tensor = getattr(output, "sequences", output)
        return sequences[:, self.start :]

    def texts(self, output: Any) -> list[str]:
        """Return the new text of every sequence that `generate` returned."""
        return list(self.tokenizer.batch_decode(self.new_tokens(output), skip_special_tokens=True))

    def require_streaming(self) -> None:
        """Raise CompositionError for beams, whose tokens come at the end, and for a `streamer` or `custom_generate`."""
        if "beam" in self.mode:
            raise CompositionError(
                "beam search knows its tokens only at the end, and has nothing to stream: use generate(), or num_beams=1"
            )
        for name in ("streamer", "custom_generate"):
            if self.arguments.get(name) is not None:
                raise CompositionError(f"stream() takes the tokens itself: leave {name} out, or pass it to generate()")


def generation_call(
    model: nn.Module, tokenizer: Any, texts: Sequence[Prompt], seeds: Sequence[int] | None, settings: Mapping[str, Any]
) -> GenerationCall:
    """Return one call for a batch of texts and conversations, with the caller's `settings` for `generate`.

    `seeds` are one for each text, or None. Raises CompositionError for settings that would run downloaded code or another
    thread, ScopeError for a mode that takes one text only.
    """
    if not callable(getattr(model, "generate", None)):
        raise CompositionError(
            f"{type(model).__name__} does not generate: load a causal or an encoder-decoder language model"
        )
    for name in ("input_ids", "inputs", "inputs_embeds", "attention_mask"):
        if settings.get(name) is not None:
            raise CompositionError(
                f"{name} is made from the texts: leave it out, or call the model's own generate() inside activate()"
            )
    arguments = dict(settings)
    mode = _mode(model, settings)
    _require_local(mode, settings)
    if mode == "assisted_generation" and len(texts) > 1:
        raise ScopeError(
            f"assisted generation and prompt lookup take one text at a time, but there are {len(texts)}: give them one by "
            "one, or leave the assistant out"
        )
    batch, pad = encode_texts(model, tokenizer, texts)
    config = getattr(model, "generation_config", None)
    if "pad_token_id" not in arguments and getattr(config, "pad_token_id", None) is None:
        arguments["pad_token_id"] = pad
    if (stop := arguments.pop("stop_strings", None)) is not None:
        from transformers import StoppingCriteriaList, StopStringCriteria

        others = arguments.get("stopping_criteria") or ()
        arguments["stopping_criteria"] = StoppingCriteriaList([*others, StopStringCriteria(tokenizer, stop)])
    if seeds is not None:
        _require_seedable(mode, seeds, len(texts), settings)
    # several sequences a text would repeat the index, too
    keep = last_logits(model) if mode in ("greedy_search", "sample") and not arguments.get("num_return_sequences") else {}
    start = 0 if has_two_sequences(model) else batch["input_ids"].shape[1]
    return GenerationCall(tokenizer, {**keep, **arguments, **batch}, seeds, mode, start)


def _mode(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """Return the name of the decoding that transformers will choose, such as "greedy_search" or "sample"; "" if unknown."""
    merged = copy.deepcopy(getattr(model, "generation_config", None))
    if merged is None:
        return ""
    config = settings.get("generation_config")
    for source in ({} if config is None else vars(config), settings):
        for name, value in source.items():
            if value is not None and hasattr(merged, name):
                setattr(merged, name, value)
    return str(merged.get_generation_mode(settings.get("assistant_model")).value)


def _require_local(mode: str, settings: Mapping[str, Any]) -> None:
    decoding = settings.get("custom_generate")
    if isinstance(decoding, str) or settings.get("trust_remote_code") or (mode in DOWNLOADED and decoding is None):
        raise CompositionError(
            f"{_words(mode)} as asked for is code that transformers downloads and runs, which generate() does not: pass a "
            "decoding function of your own as custom_generate=, or choose greedy search, sampling or beams"
        )
    config = settings.get("generation_config")
    if "paged" in (settings.get("cache_implementation"), getattr(config, "cache_implementation", None)):
        raise CompositionError(
            "a paged cache means continuous batching, which packs all requests into one row and runs the model in a thread "
            "of its own: leave cache_implementation out; one batch of generate() has a mixture per text"
        )


def _require_seedable(mode: str, seeds: Sequence[int], num_texts: int, settings: Mapping[str, Any]) -> None:
    if len(seeds) != num_texts:
        raise ScopeError(f"there are {len(seeds)} seeds, but {num_texts} texts; give one for each")
    if mode != "sample" or settings.get("custom_generate") is not None:
        raise CompositionError(
            f"seeds are for sampling, and this call is {_words(mode)}: pass do_sample=True without beams, an assistant or a "
            "decoding function of your own, or leave seeds out"
        )


def _words(mode: str) -> str:
    return mode.replace("_", " ") or "of an unknown kind"


def read_prompt(given: Any, number: int) -> Prompt:
    """Return a call's text or conversation as a prompt. Raises CompositionError, or InvalidTask for turns of other forms."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Conversation) and not is_messages(given):
        alone = ": put the messages of a conversation into a list of their own" if isinstance(given, Mapping) else ""
        raise CompositionError(
            f"text {number} is {given!r:.80}, and neither a text nor a conversation, a list of {{'role', 'content'}}{alone}"
        )
    prompt = given if isinstance(given, Conversation) else Conversation.read(given, f"text {number}")
    if prompt.turns[-1][0] == "assistant":
        raise CompositionError(f"text {number} ends with the assistant's turn, to which there is no answer: leave that out")
    return prompt


def encode_texts(model: nn.Module, tokenizer: Any, texts: Sequence[Prompt]) -> tuple[dict[str, Tensor], int]:
    """Return input_ids and attention_mask, padded left (right for an encoder), and the id of the padding token."""
    encoded = prompt_ids(tokenizer, texts)
    for number, ids in enumerate(encoded):
        if not ids and tokenizer.bos_token_id is not None:
            ids.append(tokenizer.bos_token_id)
        if not ids:
            raise CompositionError(
                f"text {number} ({texts[number]!r}) has no token, and the tokenizer no bos token to begin with"
            )
    ids_BT, mask_BT = pad_rows(tokenizer, encoded, left=not has_two_sequences(model))
    device = next(model.parameters()).device
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}, pad_id(tokenizer)


def stream(generate: Callable[[Any], None], tokenizer: Any) -> Iterator[list[str]]:
    """Yield lists with one new piece of text per sequence, whenever a piece is not empty; joined, they are its whole text.

    `generate(streamer)` runs in a thread of its own, started by the first `next()`. Its errors are raised here. Closing
    the iterator, or letting it be collected, stops the generation at its next token and waits for that.
    """
    # autocast is a thread's own
    devices = ("cpu", "cuda", "mps", "xpu")
    autocasts = [(device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device)]

    def generate_alike(streamer: Any) -> None:
        with ExitStack() as stack:
            for device, dtype in autocasts:
                stack.enter_context(torch.autocast(device, dtype))
            generate(streamer)

    return _pieces(generate_alike, tokenizer)


def _pieces(generate: Callable[[Any], None], tokenizer: Any) -> Iterator[list[str]]:
    pieces: queue.SimpleQueue[list[str] | BaseException | None] = queue.SimpleQueue()
    streamer = _Streamer(tokenizer, pieces.put)

    def work() -> None:
        try:
            generate(streamer)
        except _Stopped:
            pass
        except BaseException as error:
            pieces.put(error)
        else:
            pieces.put(None)

    thread = threading.Thread(target=work, name="loraweave-stream", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        streamer.stopped = True
        # the garbage collector may end an abandoned iterator in whatever thread it runs
        if thread is not threading.current_thread():
            thread.join()


class _Stopped(Exception):
    """The signal, raised in the generating thread, that the stream is no longer read."""


class _Streamer:
    """A streamer for transformers' `generate`, for a batch of any size: it passes new text to `send`, a piece for each row.

    While `stopped` is True, the next token raises `_Stopped` in the generating thread.
    """

    def __init__(self, tokenizer: Any, send: Callable[[list[str]], None]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._send = send
        self._rows: list[GrowingText] | None = None

    def put(self, tokens: Tensor) -> None:
        """Take the next token of every sequence, or several of the only one; the first call has the prompts."""
        if self.stopped:
            raise _Stopped
        if self._rows is None:
            self._rows = [GrowingText(self._tokenizer) for _ in range(tokens.shape[0])]
            return
        new = tokens.reshape(len(self._rows), -1).tolist()
        self._pass_on([row.text(ids) for row, ids in zip(self._rows, new, strict=True)])

    def end(self) -> None:
        self._pass_on([row.rest() for row in self._rows or ()])

    def _pass_on(self, pieces: list[str]) -> None:
        if any(pieces):
            self._send(pieces)


def sample_by_seeds(seeds: Sequence[int], streamer: Any) -> Callable[..., Any]:
    """Return a `custom_generate` function: transformers' sampling loop, but each text's tokens are drawn under its own seed.

    The seeded draw is added inside the function because only there the list of processors (temperature, top-k) is complete.
    `streamer` is the caller's; transformers does not pass it to the function.
    """

    def decode(model: Any, input_ids: Tensor, logits_processor: Any, **others: Any) -> Any:
        logits_processor.append(_SeededRows(seeds, input_ids.device))
        return type(model)._sample(model, input_ids, logits_processor=logits_processor, streamer=streamer, **others)

    return decode


class _SeededRows:
    """A logits processor that draws the next tokens and masks all others, so that the sampling afterwards has no choice."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        # a text's return sequences are consecutive rows, and share its generator
        parts = scores_BV.chunk(len(self._generators))
        tokens_B1 = torch.cat(
            [
                torch.multinomial(part.softmax(dim=-1), 1, generator=generator)
                for part, generator in zip(parts, self._generators, strict=True)
            ]
        )
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, tokens_B1, 0.0)


# a tokenizer's output for the bytes of an incomplete character
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """The text of one sequence, decoded token by token.

    The text that a token adds can depend on earlier tokens (a space, the bytes of one character). It is therefore the
    difference between the texts of the last few tokens with it and without it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._before: list[int] = []
        self._new: list[int] = []

    def text(self, ids: list[int]) -> str:
        """Return the text that these tokens add; "" while a character is incomplete."""
        self._new += [token for token in ids if token not in self._special]
        return self._new_text(complete=True) if self._new else ""

    def rest(self) -> str:
        """Return the text that is left at the end, an incomplete character included."""
        return self._new_text(complete=False) if self._new else ""

    def _new_text(self, *, complete: bool) -> str:
        old, both = self._decode(self._before), self._decode(self._before + self._new)
        if complete and (both.endswith(INCOMPLETE) or not both.startswith(old) or len(both) == len(old)):
            return ""
        self._before, self._new = self._new, []
        return both[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.batch_decode(torch.tensor([ids], dtype=torch.long), skip_special_tokens=True)[0])
