"""What engine.generate and engine.stream hand to the model's own `generate`: prompts, and settings that were looked over."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.generation.seeded_rows import seeded
from loraweave.errors import CompositionError, ScopeError

# modes whose decoding transformers downloads as code and runs
DOWNLOADED = ("contrastive_search", "dola_generation", "group_beam_search", "constrained_beam_search")


@dataclass(frozen=True, eq=False)
class GenerationCall:
    """One call of the model's `generate`: its arguments, its way of decoding, and where in its output new tokens begin."""

    tokenizer: Any
    arguments: Mapping[str, Any]
    seeds: Sequence[int] | None
    mode: str
    start: int

    def output(self, model: Any, streamer: Any = None) -> Any:
        """What `generate` returns; its tokens go to the streamer too, where one is given."""
        arguments = dict(self.arguments) if streamer is None else {**self.arguments, "streamer": streamer}
        if self.seeds is not None:
            arguments["custom_generate"] = seeded(self.seeds, arguments.get("streamer"))
        return model.generate(**arguments)

    def texts(self, output: Any) -> list[str]:
        """The new text of every sequence that `generate` returned."""
        sequences = output if isinstance(output, Tensor) else output.sequences
        return list(self.tokenizer.batch_decode(sequences[:, self.start :], skip_special_tokens=True))

    def require_streaming(self) -> None:
        """CompositionError where tokens are not known one by one, or go to somebody else."""
        if "beam" in self.mode:
            raise CompositionError(
                "beam search knows its tokens only at the end, and has nothing to stream: use generate(), or num_beams=1"
            )
        for name in ("streamer", "custom_generate"):
            if self.arguments.get(name) is not None:
                raise CompositionError(f"stream() takes the tokens itself: leave {name} out, or pass it to generate()")


def generation_call(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], seeds: Sequence[int] | None, settings: Mapping[str, Any]
) -> GenerationCall:
    """One call for a batch of texts, with the settings that the caller gave for `generate`.

    Raises CompositionError for what would run downloaded code or leave this thread, ScopeError for what takes one text only.
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
    batch, pad = encode(model, tokenizer, texts)
    own = getattr(model, "generation_config", None)
    if "pad_token_id" not in arguments and getattr(own, "pad_token_id", None) is None:
        arguments["pad_token_id"] = pad
    if (stop := arguments.pop("stop_strings", None)) is not None:
        arguments["stopping_criteria"] = _stopping_at(stop, tokenizer, arguments.get("stopping_criteria"))
    if seeds is not None:
        _require_seedable(mode, seeds, len(texts), settings)
    start = 0 if encodes(model) else batch["input_ids"].shape[1]
    return GenerationCall(tokenizer, {**arguments, **batch}, seeds, mode, start)


def _mode(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """The name of the way of decoding that transformers will take: "greedy_search", "sample", "beam_search", ..."""
    merged = copy.deepcopy(getattr(model, "generation_config", None))
    if merged is None:
        return ""
    given = settings.get("generation_config")
    for source in ({} if given is None else vars(given), settings):
        for name, value in source.items():
            if value is not None and hasattr(merged, name):
                setattr(merged, name, value)
    return str(merged.get_generation_mode(settings.get("assistant_model")).value)


def _require_local(mode: str, settings: Mapping[str, Any]) -> None:
    own = settings.get("custom_generate")
    if isinstance(own, str) or settings.get("trust_remote_code") or (mode in DOWNLOADED and own is None):
        raise CompositionError(
            f"{_words(mode)} as asked for is code that transformers downloads and runs, which generate() does not: pass a "
            "decoding function of your own as custom_generate=, or choose greedy search, sampling or beams"
        )
    given = settings.get("generation_config")
    if "paged" in (settings.get("cache_implementation"), getattr(given, "cache_implementation", None)):
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


def _stopping_at(stop: str | Sequence[str], tokenizer: Any, others: Any) -> Any:
    from transformers import StoppingCriteriaList, StopStringCriteria

    return StoppingCriteriaList([*(others or ()), StopStringCriteria(tokenizer, stop)])


def encode(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> tuple[dict[str, Tensor], int]:
    """The token ids and their mask, padded left (right for an encoder), and the id that pads."""
    encoded = [list(tokenizer(text)["input_ids"]) for text in texts]
    for number, ids in enumerate(encoded):
        if not ids and tokenizer.bos_token_id is not None:
            ids.append(tokenizer.bos_token_id)
        if not ids:
            raise CompositionError(
                f"text {number} ({texts[number]!r}) has no token, and the tokenizer no bos token to begin with"
            )
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    # any id will do where there is none: the mask hides it
    pad = next((token for token in candidates if token is not None), 0)
    longest = max(map(len, encoded))
    ids_BT = torch.full((len(encoded), longest), pad)
    mask_BT = torch.zeros(len(encoded), longest, dtype=torch.long)
    for row, ids in enumerate(encoded):
        place = slice(0, len(ids)) if encodes(model) else slice(longest - len(ids), longest)
        ids_BT[row, place] = torch.tensor(ids)
        mask_BT[row, place] = 1
    device = next(model.parameters()).device
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}, pad


def encodes(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
