"""Texts as a model reads them whole: rows of token ids, cut to a length, and padded into batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from loraweave.common.chat import prompt_ids
from loraweave.common.rows import GivenRows, read_rows
from loraweave.composer.model.batches import EncodedRow, batch, context_length, encode, pad_rows
from loraweave.errors import InvalidTask


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
    """Return the model's arguments for some rows, padded on the right, and which tokens are real."""
    if model.config.is_encoder_decoder:
        inputs = batch(model, tokenizer, rows).inputs
        return inputs, inputs["attention_mask"].bool()
    ids_BT, mask_BT = pad_rows(tokenizer, [row.prompt for row in rows], left=False)
    device = next(model.parameters()).device
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}, mask_BT.to(device).bool()
