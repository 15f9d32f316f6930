"""Prompts and targets as one left-padded batch, so that the targets of all rows end at the last position of a decoder.

The language head is then needed on the last few positions only (`logits_to_keep`): with a vocabulary of 49,152 the logits of
whole prompts would fill the memory. A beginning that all rows share, such as demonstrations, is read once (`Prefixes`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from loraweave.common.chat import Conversation, Prompt, answered_ids, prompt_ids
from loraweave.common.rows import GivenRows, read_rows
from loraweave.errors import InvalidTask
from loraweave.routers.tokens._call import prompted

T = TypeVar("T")

IGNORED = -100
# padding is masked, so any token will do where there is no tokenizer
NO_TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0)
# a shorter prefix costs a pass of its own and saves little
MIN_TOKENS = 32


@dataclass(frozen=True)
class TargetBatch:
    """A batch of `inputs` for the model with targets_BK, token ids or `IGNORED` where a row's target is shorter than K.

    A decoder predicts targets_BK[:, k] at position T - K - 1 + k; an encoder-decoder at decoder position k.
    """

    inputs: dict[str, Tensor]
    targets_BK: Tensor

    def tile(self, count: int) -> TargetBatch:
        """Return the whole batch `count` times, one copy after the other."""
        inputs = {key: value.repeat(count, 1) for key, value in self.inputs.items()}
        return TargetBatch(inputs, self.targets_BK.repeat(count, 1))

    def rows(self, index: Sequence[int]) -> TargetBatch:
        """Return the rows with these indices, without columns that are padding in all of them."""
        chosen = torch.tensor(index, device=self.targets_BK.device)
        inputs = {key: value[chosen] for key, value in self.inputs.items()}
        targets_BK = self.targets_BK[chosen]
        used_K = (targets_BK != IGNORED).any(dim=0).nonzero()
        first, last = int(used_K[0]), int(used_K[-1]) + 1
        real_T = inputs["attention_mask"].any(dim=0)
        for name in ("input_ids", "attention_mask", "position_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, real_T]
        if "decoder_input_ids" in inputs:
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :last]
        return TargetBatch(inputs, targets_BK[:, first:last])


@dataclass(frozen=True)
class EncodedRow:
    """One example as token ids."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def labels(self) -> tuple[int, ...]:
        """The target, with `IGNORED` for tokens without a loss."""
        return self.target

    @staticmethod
    def losses(model: Any, rows: Sequence[Any], stacked: TargetBatch) -> Tensor:
        """Return loss_BK of `stacked`, a batch of `rows` of this class: by default the negative log-likelihood."""
        return token_losses(model, stacked)


def encode(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], targets: Sequence[str], *, ends: Sequence[str | None] = ()
) -> list[EncodedRow]:
    """Return the token ids of each prompt and, tokenised separately, of " target" with its end.

    `ends` are by default the end of sequence. A conversation is followed by the assistant's turn, as in `answered_ids`,
    whose errors are raised. Raises InvalidTask for a prompt or a target without tokens and for a row above the model's
    context.
    """
    # tokenizers refuse an empty list
    if not prompts:
        return []
    limit = context_length(model)
    target_ids = answer_ids(tokenizer, targets, ends)
    rows = []
    text_ids = iter(prompt_ids(tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)]))
    for number, (raw_prompt, target) in enumerate(zip(prompts, target_ids, strict=True)):
        if isinstance(raw_prompt, Conversation):
            try:
                prompt, target = answered_ids(tokenizer, raw_prompt, targets[number])
            except InvalidTask as error:
                raise InvalidTask(f"row {number + 1} (prompt {str(raw_prompt)[:60]!r}): {error}") from error
        else:
            prompt = next(text_ids)
        if not targets[number].strip() or not target:
            raise InvalidTask(f"row {number + 1} (prompt {str(raw_prompt)[:60]!r}) has an empty target")
        if not prompt:
            raise InvalidTask(f"row {number + 1} (target {targets[number][:60]!r}) has an empty prompt to predict it from")
        row = EncodedRow(tuple(prompt), tuple(target))
        if limit and len(row) > limit:
            raise InvalidTask(
                f"row {number + 1} has {len(row)} tokens with its target, but the model's context is {limit}; shorten it"
            )
        rows.append(row)
    return rows


def answer_ids(tokenizer: Any, answers: Sequence[str], ends: Sequence[str | None] = ()) -> list[list[int]]:
    """Return the token ids of each " answer" with its end text; None, the default, is the end-of-sequence token."""
    end_texts = [tokenizer.eos_token or "" if end is None else end for end in ends or [None] * len(answers)]
    texts = [f" {answer}{end}" for answer, end in zip(answers, end_texts, strict=True)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def context_length(model: Any) -> int | None:
    """Return the number of tokens that the model can attend to, or None where its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)


def batch(model: Any, tokenizer: Any, rows: Sequence[EncodedRow]) -> TargetBatch:
    """Return the rows as one batch on the model's device."""
    width = max([len(row.target) for row in rows])
    targets_BK = torch.full((len(rows), width), IGNORED)
    device = next(model.parameters()).device
    if model.config.is_encoder_decoder:
        for index, row in enumerate(rows):
            targets_BK[index, : len(row.target)] = torch.tensor(row.target)
        # an encoder that has learned its positions counts them from the first column
        ids, mask = pad_rows(tokenizer, [row.prompt for row in rows], left=False)
        targets_BK, inputs = targets_BK.to(device), {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        # every model of this kind shifts labels to the right itself; the helper is part of its public face
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(targets_BK)
        return TargetBatch(inputs, targets_BK)
    for index, row in enumerate(rows):
        targets_BK[index, width - len(row.target) :] = torch.tensor(row.labels)
    ids, mask = pad_rows(tokenizer, [row.prompt + row.target for row in rows])
    return TargetBatch(with_positions(model, ids.to(device), mask.to(device)), targets_BK.to(device))


def in_chunks(items: list[T], size: int) -> list[list[T]]:
    """Return the items in their order, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def pad_id(tokenizer: Any) -> int:
    """Return the token for padding: the tokenizer's padding, its end of sequence, or 0; the mask hides it."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if token is None else int(token)


def pad_rows(tokenizer: Any, rows: Sequence[Sequence[int]], *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Return (ids_BT, mask_BT) of rows of token ids, filled up on one side."""
    longest = max(map(len, rows))
    ids_BT = torch.full((len(rows), longest), pad_id(tokenizer))
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        start = longest - len(row) if left else 0
        ids_BT[index, start : start + len(row)] = torch.tensor(row)
        mask_BT[index, start : start + len(row)] = 1
    return ids_BT, mask_BT


def with_positions(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Return decoder inputs whose positions start at each row's first real token, where the model takes positions."""
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if takes(model, "position_ids"):
        inputs["position_ids"] = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def align_left(ids_BT: Tensor, mask_BT: Tensor | None) -> dict[str, Tensor]:
    """Return token ids and mask with all padding moved to the left; without a mask all tokens are real."""
    if mask_BT is None:
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    order_BT = mask_BT.ne(0).int().argsort(dim=1, stable=True)
    return {"input_ids": ids_BT.gather(1, order_BT), "attention_mask": mask_BT.gather(1, order_BT)}


def token_losses(model: Any, batch: TargetBatch) -> Tensor:
    """Return loss_BK, the negative log-likelihood of every target token in fp32, 0 where the target is shorter than K."""
    asked_K = (batch.targets_BK != IGNORED).any(dim=0)
    if bool(asked_K.all()) or model.config.is_encoder_decoder:
        return losses_of(target_logits(model, batch), batch.targets_BK)
    # the head computes only the positions where some row has a target
    found_BJ = losses_of(target_logits(model, batch, asked_K=asked_K), batch.targets_BK[:, asked_K])
    return found_BJ.new_zeros(batch.targets_BK.shape).masked_scatter(asked_K.expand_as(batch.targets_BK), found_BJ)


def token_scores(model: Any, batch: TargetBatch) -> tuple[Tensor, Tensor]:
    """Return (loss_BK, hit_BK); hit is True where the target token is the likeliest, False beyond a shorter target."""
    logits_BKV = target_logits(model, batch)
    return losses_of(logits_BKV, batch.targets_BK), logits_BKV.argmax(dim=2) == batch.targets_BK


def target_logits(model: Any, batch: TargetBatch, *, whole: bool = False, asked_K: Tensor | None = None) -> Tensor:
    """Return logits_BKV at the positions that predict the targets, or only at those that `asked_K` marks.

    With `whole`, the head computes the logits of all of a decoder's tokens.
    """
    if model.config.is_encoder_decoder:
        return cast(Tensor, model(**batch.inputs, use_cache=False).logits)
    width, length = batch.targets_BK.shape[1], batch.inputs["input_ids"].shape[1]
    place_K = torch.arange(length - width - 1, length - 1, device=batch.targets_BK.device)
    prompt_BT = batch.inputs["attention_mask"].clone()
    prompt_BT[:, -width:] *= batch.targets_BK == IGNORED
    with prompted(batch.inputs["input_ids"], prompt_BT):
        if whole:
            return cast(Tensor, model(**batch.inputs, use_cache=False).logits[:, -width - 1 : -1])
        return logits_at(model, batch.inputs, place_K if asked_K is None else place_K[asked_K])


def logits_at(model: Any, inputs: Mapping[str, Tensor], place_K: Tensor) -> Tensor:
    """Return a decoder's logits at these positions of every row."""
    # positions as an index tensor: for a slice, transformers hands the head a strided view, which bf16 products copy
    if takes(model, "logits_to_keep"):
        return cast(Tensor, model(**inputs, logits_to_keep=place_K, use_cache=False).logits)
    return cast(Tensor, model(**inputs, use_cache=False).logits[:, place_K])


def losses_of(logits_BKV: Tensor, targets_BK: Tensor) -> Tensor:
    """Return loss_BK in fp32 or better: the negative log-likelihood of each target, 0 where it is `IGNORED`."""
    exact_NV = logits_BKV.to(torch.promote_types(logits_BKV.dtype, torch.float32)).flatten(0, 1)
    flat = functional.cross_entropy(exact_NV, targets_BK.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(targets_BK.shape)


def entropies_of(logits_BKV: Tensor, targets_BK: Tensor) -> Tensor:
    """Return entropy_BK of the predictions in nats, in fp32 or better, 0 where the target is `IGNORED`."""
    log_p_BKV = logits_BKV.to(torch.promote_types(logits_BKV.dtype, torch.float32)).log_softmax(dim=-1)
    entropy_BK = -(log_p_BKV.exp() * log_p_BKV).sum(dim=-1)
    return entropy_BK.masked_fill(targets_BK == IGNORED, 0.0)


def mean_losses(model: Any, batch: TargetBatch) -> Tensor:
    """Return loss_B, the mean over each row's target tokens."""
    counts_B = (batch.targets_BK != IGNORED).sum(dim=1)
    return token_losses(model, batch).sum(dim=1) / counts_B


def tensors_in(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among a model's inputs, by name."""
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def takes(model: Any, argument: str) -> bool:
    """Return True if the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def last_logits(model: Any) -> dict[str, Tensor]:
    """Return the argument `logits_to_keep` that asks for each row's last logits alone; {} if the model does not take it."""
    # for a number the model takes a slice, and on a CPU torch then copies the head's weights for every row
    last = {"logits_to_keep": torch.tensor([-1], device=next(model.parameters()).device)}
    return last if takes(model, "logits_to_keep") else {}


def end_tokens(model: Any) -> list[int] | None:
    """Return the tokens at which the model's generation settings end a sequence; None if they name no token."""
    end_ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return end_ids if end_ids is None or isinstance(end_ids, list) else [end_ids]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and freeze the parameters for the block; restore every module and parameter after it."""
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The cached keys and values of each group's common beginning: ids_MP and mask_MP, P tokens for M groups of rows."""

    ids_MP: Tensor
    mask_MP: Tensor
    lengths: tuple[int, ...]
    cache: Any

    @classmethod
    def of(cls, model: Any, tokenizer: Any, groups: Sequence[Sequence[Sequence[int]]]) -> Prefixes | None:
        """Read each group's common beginning, leaving at least one token to each row, and return the cached keys and values.

        Returns None if sharing does not pay or cannot be exact: for encoder-decoders, for models without positions, and for
        caches other than plain keys and values.
        """
        if any(len(rows) < 2 for rows in groups) or model.config.is_encoder_decoder or not takes(model, "position_ids"):
            return None
        common = [_beginning(rows) for rows in groups]
        lengths = tuple(map(len, common))
        if max(lengths) < MIN_TOKENS or not min(lengths):
            return None
        device = next(model.parameters()).device
        ids_MP, mask_MP = pad_rows(tokenizer, common)
        inputs = {name: value.to(device) for name, value in with_positions(model, ids_MP, mask_MP).items()}
        cache = model(**inputs, use_cache=True, **last_logits(model))[cache_name(model)]
        return cls(ids_MP, mask_MP, lengths, cache) if is_plain(cache) else None

    def before(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Any]:
        """Return (inputs, cache) for rows of token ids, equally many of each group, one group after the other.

        The inputs are the whole rows, padded before the prefix and between it and the rest; the cache has the prefixes, by
        row.
        """
        device, group_size = next(model.parameters()).device, len(rows) // len(self.lengths)
        rest = [row[self.lengths[number // group_size] :] for number, row in enumerate(rows)]
        rest_BT, mask_BT = pad_rows(tokenizer, rest)
        ids_BT = torch.cat([self.ids_MP.repeat_interleave(group_size, dim=0), rest_BT], dim=1)
        mask_BT = torch.cat([self.mask_MP.repeat_interleave(group_size, dim=0), mask_BT], dim=1)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(group_size)
        inputs = with_positions(model, ids_BT, mask_BT)
        return {name: value.to(device) for name, value in inputs.items()}, cache

    def after(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return arguments for a call of the model that reads only the rest of these rows, after their prefixes."""
        inputs, cache = self.before(model, tokenizer, rows)
        return {**following(inputs, self.ids_MP.shape[1]), cache_name(model): cache}


def _beginning(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the tokens that all rows begin with, without the last one of the shortest row."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*(row[:-1] for row in rows), strict=False))
    return tuple(column[0] for column in columns)


def is_plain(cache: Any) -> bool:
    """Return True if a cache holds keys and values of whole rows alone: no sliding window, state or quantised values."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def following(inputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return a decoder's inputs without the first `length` tokens, except the mask, which covers all tokens."""
    return {name: value if name == "attention_mask" else value[:, length:] for name, value in inputs.items()}


def cache_name(model: Any) -> str:
    """Return the name of the cache's argument: transformers 5.24 renamed it; the floor 5.3 has the old name."""
    return "cache" if takes(model, "cache") else "past_key_values"


def pad_apart(given: TargetBatch) -> TargetBatch:
    """Return an encoder-decoder's batch, padded so that the decoder's width is above 1 and differs from the encoder's.

    The width of a layer's input then tells the encoder's tokens from the decoder's.
    """
    inputs, targets_BK = dict(given.inputs), given.targets_BK
    if targets_BK.shape[1] == 1:
        targets_BK = functional.pad(targets_BK, (0, 1), value=IGNORED)
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"].repeat(1, 2)
    if targets_BK.shape[1] == inputs["input_ids"].shape[1]:
        inputs = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], dim=1),
            "attention_mask": functional.pad(inputs["attention_mask"], (0, 1)),
        }
    return TargetBatch(inputs, targets_BK)


def text_rows(model: Any, tokenizer: Any, texts: GivenRows, max_tokens: int) -> list[EncodedRow]:
    """Return the texts' token ids, cut to `max_tokens` (each side of an encoder-decoder).

    Raises InvalidTask for no text, for an empty one, for targets in some rows only, and for texts without a target where the
    model is an encoder-decoder.
    """
    samples = read_rows(texts, noun="text", targets="any")
    if not samples:
        raise InvalidTask("there is no text: give a list of texts, or of rows with input and target")
    pairs = [(row.asked, row.targets[0]) for row in samples if row.targets]
    if len(pairs) not in (0, len(samples)):
        raise InvalidTask("some rows have a target and some have none: give texts, or rows with input and target")
    both = model.config.is_encoder_decoder
    if both and not pairs:
        raise InvalidTask("an encoder-decoder reads one text and writes another: give pairs (input, target), not texts")
    if pairs:
        rows = encode(model, tokenizer, [text for text, _ in pairs], [target for _, target in pairs])
    else:
        rows = [EncodedRow(tuple(ids), ()) for ids in prompt_ids(tokenizer, [row.asked for row in samples])]
    if both:
        cut = [EncodedRow(row.prompt[:max_tokens], row.target[:max_tokens]) for row in rows]
    else:
        most = min(max_tokens, context_length(model) or max_tokens)
        cut = [EncodedRow((row.prompt + row.target)[:most], ()) for row in rows]
    for number, row in enumerate(cut, start=1):
        if not len(row):
            raise InvalidTask(f"text {number} ({samples[number - 1].input!r:.60}) has no token; leave it out")
    return cut


def padded_inputs(model: Any, tokenizer: Any, rows: Sequence[EncodedRow]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the model's arguments for some rows, padded on the right, and real_BT, which tokens are real."""
    if model.config.is_encoder_decoder:
        inputs = batch(model, tokenizer, rows).inputs
        return inputs, inputs["attention_mask"].bool()
    ids_BT, mask_BT = pad_rows(tokenizer, [row.prompt for row in rows], left=False)
    device = next(model.parameters()).device
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}, mask_BT.to(device).bool()
