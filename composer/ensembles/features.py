"""What the model makes of each row's last token under each member: the features that reward heads read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.batches import padded_rows, takes
from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.inputs import last_positions, right_aligned, without_cache
from loraweave.composer.ensembles.member_passes import known_members, member_passes, rows_that_fit
from loraweave.errors import CompositionError, InvalidTask
from loraweave.hub.progress import tracked

TEXTS_PER_BATCH = 32


def features(
    engine: Composer, mixtures: Sequence[Any], batch: Mapping[str, Any], *, rows_per_pass: int | None = None
) -> Tensor:
    """features_MBH in fp32 or better: the last hidden state of each row's last real token, under each member.

    Of an encoder-decoder, of its decoder. Members and batch are those of `ensemble`; padding may be on
    either side. Raises what `ensemble` raises, and CompositionError for a model that gives no hidden state.
    """
    members = known_members(engine, mixtures)
    model: Any = engine.model
    fitting = rows_that_fit(batch, 1) if rows_per_pass is None else rows_per_pass

    def read(inputs: dict[str, Any]) -> Tensor:
        hidden_NTH = _last_hidden(model, inputs)
        name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
        place_N = last_positions(inputs, 1, hidden_NTH.shape[1], name)[:, 0].to(hidden_NTH.device)
        found_NH = hidden_NTH[torch.arange(len(hidden_NTH), device=hidden_NTH.device), place_N]
        return found_NH.to(torch.promote_types(found_NH.dtype, torch.float32))

    return member_passes(engine, members, right_aligned(batch), read, rows_per_pass=fitting)


def text_features(engine: Composer, mixtures: Sequence[Any], texts: Sequence[str], *, progress: bool = True) -> Tensor:
    """features_MNH of texts, each run once under each member, in batches of similar length.

    Raises CompositionError without a tokenizer, InvalidTask without texts and for one without tokens.
    """
    if engine.tokenizer is None:
        raise CompositionError("texts need a tokenizer: make the Composer with tokenizer=...")
    ids = [list(row) for row in engine.tokenizer(list(texts))["input_ids"]] if texts else []
    if not ids or not all(ids):
        raise InvalidTask(f"text {ids.index([]) + 1} has no tokens" if ids else "there are no texts")
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    starts = range(0, len(order), TEXTS_PER_BATCH)
    parts = []
    for start in tracked(starts, "features", total=len(starts), shown=progress):
        rows = [ids[index] for index in order[start : start + TEXTS_PER_BATCH]]
        parts.append(features(engine, mixtures, _right_padded(engine, rows)))
    place_N = torch.tensor(order).argsort()
    return torch.cat(parts, dim=1)[:, place_N.to(parts[0].device)]


def _last_hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    """hidden_NTH, seen where the model without its head gives it: no logits of whole texts, no states of other layers."""
    seen: list[Tensor | None] = []

    def see(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(getattr(output, "last_hidden_state", None))

    # an encoder-decoder may have no module for all but its head
    body = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    handle = body.register_forward_hook(see)
    try:
        arguments = {**inputs, "logits_to_keep": 1} if takes(model, "logits_to_keep") else inputs
        model(**without_cache(model, arguments))
    finally:
        handle.remove()
    if not seen or seen[-1] is None:
        raise CompositionError(f"{type(body).__name__} gives no last_hidden_state to read features from")
    return seen[-1]


def _right_padded(engine: Composer, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    device = next(engine.model.parameters()).device
    ids_BT, mask_BT = padded_rows(engine.tokenizer, rows, left=False)
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}
