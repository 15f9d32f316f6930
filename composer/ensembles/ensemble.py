"""Averaged probabilities of several mixtures: LoRA ensembles (Wang, Aitchison and Rudolph, 2023, arXiv 2310.00035)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.batches import left_aligned, takes
from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.inputs import last_positions, right_aligned, without_cache, without_left_padding
from loraweave.composer.ensembles.member_passes import (
    known_members,
    member_passes,
    member_weights,
    rows_of,
    rows_that_fit,
)
from loraweave.composer.ensembles.prediction import EnsemblePrediction
from loraweave.composer.scoring import label_ids, label_losses
from loraweave.errors import CompositionError, InvalidTask
from loraweave.hub.whole_number import require_whole

# positions follow from the first two; tokenizers say that a text has one segment
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def ensemble(
    engine: Composer,
    mixtures: Sequence[Any],
    batch: Mapping[str, Any],
    *,
    weights: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    num_positions: int | None = None,
    rows_per_pass: int | None = None,
) -> EnsemblePrediction:
    """What the members say about each row of a batch together: p(y|x) = sum over m of w_m softmax(f(x; W + update of m)).

    A member is one mixture for all rows: {name: weight}, None for the base, MixtureWeights of one row, or a router. `batch`
    is what the model takes (a tokenizer's output), padded on either side. `weights` are the members' shares, by default
    equal; they are divided by their sum. Probabilities are averaged, never logits or weights.

    The outcomes are the next token after each row's last one; with `num_positions=K` after each of its last K, on an axis of
    positions. `tokens` restricts each member's softmax to some token ids, `labels` to some texts by their summed
    log-likelihood after the row (after a space, and with the end of sequence, as Composition.predict ranks them); this
    needs the engine's tokenizer. A model that classifies rows gives its classes.

    Members run beside each other, `rows_per_pass` rows in a forward pass, by default as many as 2^13 tokens and 2^26 logits
    allow. Raises WeightingError for members or weights that are none, UnknownExpert, InvalidTask for labels or tokens,
    CompositionError for a batch that cannot be read so; the model is left as it was.
    """
    members = known_members(engine, mixtures)
    weight_M = member_weights(weights, len(members))
    num_rows = rows_of(batch)
    if rows_per_pass is not None:
        require_whole("rows_per_pass", rows_per_pass, 1, CompositionError)
    if labels is not None:
        if tokens is not None or num_positions is not None:
            raise InvalidTask("labels= follow a row's last token: leave tokens= and num_positions= out, or labels=")
        members_MBL = _label_members(engine, members, batch, tuple(labels), rows_per_pass)
        return EnsemblePrediction(members_MBL, weight_M, tuple(labels))
    reader = _NextTokens(engine.model, num_positions, None if tokens is None else _checked(engine.model, tokens))
    inputs = without_left_padding(engine.model, batch)
    fitting = rows_that_fit(batch, reader.logits_per_row(batch)) if rows_per_pass is None else rows_per_pass
    members_MBV = member_passes(engine, members, inputs, reader.read, rows_per_pass=min(fitting, num_rows * len(members)))
    return EnsemblePrediction(members_MBV, weight_M, () if tokens is None else tuple(tokens))


def _label_members(
    engine: Composer, members: Sequence[Any], batch: Mapping[str, Any], labels: Sequence[str], rows_per_pass: int | None
) -> Tensor:
    """log p_MBL: each member's softmax over the labels' summed log-likelihoods."""
    model: Any = engine.model
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise CompositionError("labels= need a tokenizer: make the Composer with tokenizer=..., or give tokens=[ids]")
    if len(set(labels)) != len(labels) or not labels:
        raise InvalidTask(f"labels are {labels!r}; give at least one, each once")
    if "input_ids" not in batch or set(batch) - set(TEXT_INPUTS):
        raise CompositionError(
            f"labels= follow a text ({', '.join(TEXT_INPUTS)}), but the batch has {', '.join(batch)}; give tokens=[ids]"
        )
    ids = label_ids(tokenizer, labels)
    width = max(map(len, ids))
    prefix = left_aligned(batch["input_ids"], batch.get("attention_mask"))
    if model.config.is_encoder_decoder:
        prefix = right_aligned(prefix)
    if rows_per_pass is None:
        logits_per_row = len(ids) * width * model.config.get_text_config().vocab_size
        rows_per_pass = rows_that_fit(prefix, logits_per_row, copies=len(ids))

    def read(inputs: dict[str, Any]) -> Tensor:
        losses_NL = label_losses(model, inputs["input_ids"], inputs["attention_mask"], ids)
        return (-losses_NL).log_softmax(dim=1)

    return member_passes(engine, members, prefix, read, rows_per_pass=rows_per_pass)


class _NextTokens:
    """Log-probabilities of the next token at the last positions of each row, from one call of the model."""

    def __init__(self, model: Any, num_positions: int | None, tokens: Tensor | None) -> None:
        if num_positions is not None:
            require_whole("num_positions", num_positions, 1, CompositionError)
        self.model = model
        self.num_positions = num_positions
        self.tokens = tokens

    def logits_per_row(self, batch: Mapping[str, Any]) -> int:
        kept = self._kept(batch)
        length = batch["input_ids"].shape[1] if "input_ids" in batch else 1
        return (length if kept is None else len(kept)) * int(getattr(self.model.config.get_text_config(), "vocab_size", 1))

    def read(self, inputs: dict[str, Any]) -> Tensor:
        kept = self._kept(inputs)
        arguments = inputs if kept is None else {**inputs, "logits_to_keep": kept}
        logits = self.model(**without_cache(self.model, arguments)).logits
        if logits.dim() == 2:
            if self.num_positions is not None:
                raise CompositionError("this model classifies whole rows, and has no num_positions=")
            return self._log_softmax(logits)
        count = self.num_positions or 1
        if kept is None:
            name = "decoder_attention_mask" if self.model.config.is_encoder_decoder else "attention_mask"
            place_BK = last_positions(inputs, count, logits.shape[1], name).to(logits.device)
        else:
            place_BK = last_positions(inputs, count, inputs["input_ids"].shape[1]).to(logits.device) - kept[0]
        index = place_BK.expand(len(logits), -1)[:, :, None].expand(-1, -1, logits.shape[2])
        log_p = self._log_softmax(logits.gather(1, index))
        return log_p[:, 0] if self.num_positions is None else log_p

    def _log_softmax(self, logits: Tensor) -> Tensor:
        if self.tokens is not None:
            logits = logits[..., self.tokens.to(logits.device)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)

    def _kept(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The positions whose logits are needed for some row; None where the model has to give them all."""
        if self.model.config.is_encoder_decoder or "input_ids" not in inputs or not takes(self.model, "logits_to_keep"):
            return None
        place_BK = last_positions(inputs, self.num_positions or 1, inputs["input_ids"].shape[1])
        return torch.arange(int(place_BK.min()), int(place_BK.max()) + 1, device=inputs["input_ids"].device)


def _checked(model: Any, tokens: Sequence[int]) -> Tensor:
    size = int(getattr(model.config.get_text_config(), "vocab_size", 0))
    whole = all(isinstance(token, int) and not isinstance(token, bool) for token in tokens)
    if not whole or not tokens or len(set(tokens)) != len(tokens) or not all(0 <= token < size for token in tokens):
        raise InvalidTask(f"tokens are {tokens!r}; give at least one id below {size}, each once")
    return torch.tensor(list(tokens))
