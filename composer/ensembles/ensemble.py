"""Averaged probabilities of several mixtures: LoRA ensembles (Wang, Aitchison and Rudolph, 2023, arXiv 2310.00035)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from loraweave.common.chat import Prompt
from loraweave.common.checks import require_whole
from loraweave.common.options import Range, fits
from loraweave.common.rows import GivenRows, read_asked
from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.member_passes import (
    known_members,
    member_passes,
    member_weights,
    rows_of,
    rows_that_fit,
    tensors_of,
)
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import align_left, takes
from loraweave.composer.model.scoring import label_ids, label_losses
from loraweave.errors import CompositionError, InvalidTask
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

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
    """Return the members' averaged probabilities for each row: p(y|x) = sum over m of w_m softmax(f(x; W + update of m)).

    A member is one mixture for all rows: {name: weight}, None for the base, MixtureWeights of one row, or a router. `batch`
    is what the model takes (a tokenizer's output), padded on either side. `weights` are the members' shares, by default
    equal; they are divided by their sum. Probabilities are averaged, never logits or weights.

    The outcomes are the next token after each row's last one; with `num_positions=K` after each of its last K, on an axis of
    positions. `tokens` restricts each member's softmax to some token ids, `labels` to some texts by their summed
    log-likelihood after the row (after a space, and with the end of sequence, as Composition.predict ranks them); this
    needs the engine's tokenizer. A model that classifies rows gives its classes.

    Members run beside each other, `rows_per_pass` rows in a forward pass, by default as many as 2^13 tokens and 2^26 logits
    allow. Raises WeightingError for invalid members or weights, UnknownExpert, InvalidTask for labels or tokens,
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
    reader = _NextTokens(engine.model, num_positions, None if tokens is None else _token_ids(engine.model, tokens))
    inputs = without_left_padding(engine.model, batch)
    fitting = rows_that_fit(batch, reader.logits_per_row(batch)) if rows_per_pass is None else rows_per_pass
    members_MBV = member_passes(engine, members, inputs, reader.read, rows_per_pass=min(fitting, num_rows * len(members)))
    return EnsemblePrediction(members_MBV, weight_M, () if tokens is None else tuple(tokens))


def _label_members(
    engine: Composer, members: Sequence[Any], batch: Mapping[str, Any], labels: Sequence[str], rows_per_pass: int | None
) -> Tensor:
    """Return log p_MBL, each member's softmax over the labels' summed log-likelihoods."""
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
    prefix = align_left(batch["input_ids"], batch.get("attention_mask"))
    if model.config.is_encoder_decoder:
        prefix = align_right(prefix)
    if rows_per_pass is None:
        logits_per_row = len(ids) * width * model.config.get_text_config().vocab_size
        rows_per_pass = rows_that_fit(prefix, logits_per_row, copies=len(ids))

    def read(inputs: dict[str, Any]) -> Tensor:
        losses_NL = label_losses(model, inputs["input_ids"], inputs["attention_mask"], [ids])
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
        kept = self._kept_positions(batch)
        length = batch["input_ids"].shape[1] if "input_ids" in batch else 1
        return (length if kept is None else len(kept)) * int(getattr(self.model.config.get_text_config(), "vocab_size", 1))

    def read(self, inputs: dict[str, Any]) -> Tensor:
        kept = self._kept_positions(inputs)
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

    def _kept_positions(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the positions whose logits some row needs; None where the model has to give them all."""
        if self.model.config.is_encoder_decoder or "input_ids" not in inputs or not takes(self.model, "logits_to_keep"):
            return None
        place_BK = last_positions(inputs, self.num_positions or 1, inputs["input_ids"].shape[1])
        return torch.arange(int(place_BK.min()), int(place_BK.max()) + 1, device=inputs["input_ids"].device)


def _token_ids(model: Any, tokens: Sequence[int]) -> Tensor:
    size = int(getattr(model.config.get_text_config(), "vocab_size", 0))
    known = fits(tuple(tokens), tuple[Annotated[int, Range(least=0, below=size)], ...])
    if not known or not tokens or len(set(tokens)) != len(tokens):
        raise InvalidTask(f"tokens are {tokens!r}; give at least one id below {size}, each once")
    return torch.tensor(list(tokens))


@dataclass(frozen=True, eq=False)
class EnsemblePrediction:
    """Distributions over outcomes on the last axis, averaged as probabilities: p = sum over members of w_m p_m.

    `members_MBV` are the log-probabilities of each member for each row, with an axis of positions before the last where
    several were asked for; weight_M sums to 1. `outcomes` are what the last axis stands for: labels or token ids, or empty
    where it is the whole vocabulary or the model's own classes. Entropies are in nats.
    """

    members_MBV: Tensor
    weight_M: Tensor
    outcomes: tuple[str, ...] | tuple[int, ...] = ()

    @cached_property
    def log_probabilities(self) -> Tensor:
        """The log-probabilities log p, (B, ..., V), exact even where every member's probability underflows."""
        return torch.logsumexp(self.members_MBV + self._column().log(), dim=0)

    @property
    def probabilities(self) -> Tensor:
        """The probabilities p, (B, ..., V)."""
        return self.log_probabilities.exp()

    @property
    def best(self) -> list[str] | list[int]:
        """The likeliest outcome of each row: a label or token id, or its index where `outcomes` is empty.

        Rows of several positions follow each other.
        """
        indices = self.log_probabilities.argmax(dim=-1).flatten().tolist()
        return [self.outcomes[index] for index in indices] if self.outcomes else indices

    @property
    def entropy(self) -> Tensor:
        """The entropy of the average, (B, ...): the whole uncertainty of the outcome."""
        return _entropy(self.probabilities)

    @property
    def member_entropy(self) -> Tensor:
        """The entropy of each member, (M, B, ...)."""
        return _entropy(self.members_MBV.exp())

    @property
    def disagreement(self) -> Tensor:
        """The entropy of the average less the average entropy, (B, ...): the mutual information of outcome and member.

        It is 0 where all members say the same, and at most the entropy of the weights.
        """
        average = (self.member_entropy * self._column().squeeze(-1)).sum(dim=0)
        return (self.entropy - average).clamp(min=0)

    def _column(self) -> Tensor:
        """Return the weights along the members' axis, to be broadcast over the others."""
        weight_M = self.weight_M.to(self.members_MBV)
        return weight_M.view(-1, *[1] * (self.members_MBV.dim() - 1))


def _entropy(probabilities: Tensor) -> Tensor:
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(dim=-1)


def last_positions(batch: Mapping[str, Any], count: int, length: int, mask_name: str = "attention_mask") -> Tensor:
    """Return place_BK, the places of the last `count` real tokens of each row of `length`; all are real without a mask.

    Raises CompositionError for a row of fewer tokens, and for a mask that does not say which tokens are padding.
    """
    mask = batch.get(mask_name)
    if mask is None:
        end_B = torch.tensor([length - 1])
        num_tokens = length
    else:
        if mask.dim() != 2:
            raise CompositionError(f"{mask_name} has {mask.dim()} axes; give one of two, which says what is padding")
        end_B = length - 1 - mask.flip(1).ne(0).int().argmax(dim=1)
        num_tokens = int(mask.ne(0).sum(dim=1).min())
    if count > num_tokens:
        raise CompositionError(f"{count} positions were asked for, but the shortest row has {num_tokens} tokens")
    return end_B[:, None] + torch.arange(1 - count, 1, device=end_B.device)


def without_left_padding(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch, changed if need be so that padding before a row's tokens does not count as positions.

    A decoder gets position ids from the mask, unless some are given; for any other model the padding goes to the end.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or not bool((mask[:, 0] == 0).any()) or "position_ids" in batch:
        return dict(batch)
    if model.can_generate() and not model.config.is_encoder_decoder and takes(model, "position_ids"):
        return {**batch, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    return align_right(batch)


def align_right(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with all padding after a row's tokens; every tensor of the mask's shape moves with it."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return dict(batch)
    order_BT = mask.eq(0).int().argsort(dim=1, stable=True)
    inputs = {key: value for key, value in tensors_of(batch).items() if not key.startswith("decoder")}
    return {**batch, **{key: value.gather(1, order_BT) for key, value in inputs.items() if value.shape == mask.shape}}


def without_cache(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call that no other follows, without a cache unless the batch asks for one."""
    return {"use_cache": False, **inputs} if takes(model, "use_cache") else dict(inputs)


def answers(
    engine: Composer,
    mixtures: Sequence[Any],
    task: Task | Sequence[Task],
    inputs: GivenRows,
    *,
    weights: Sequence[float] | None = None,
    max_new_tokens: int = scoring.MAX_NEW_TOKENS,
) -> list[str]:
    """Return one answer for each input: the label of the highest averaged probability, else the first greedily decoded line.

    Decoding takes at each step the token of the highest average of the members' probabilities, from which all members go
    on: p(y) is the product of these averages. Members run as rows of one batch with a cache of keys and values.
    A list of tasks, one for each member, asks each in prompts of its own, under demonstrations say. A member whose task has
    several `orders` is asked in each, with that part of its share.
    `mixtures` and `weights` are those of `ensemble`; raises what it raises, CompositionError without a tokenizer, and
    InvalidTask for inputs that are no texts and no rows, and for tasks that are fewer than the members or differ in labels.
    """
    texts = read_asked(inputs)
    tasks = _tasks_of(task, len(mixtures))
    return answers_to(engine, mixtures, tasks, [texts] * len(tasks), weights=weights, max_new_tokens=max_new_tokens)


def answers_to(
    engine: Composer,
    mixtures: Sequence[Any],
    tasks: Sequence[Task],
    inputs_MN: Sequence[Sequence[Prompt]],
    *,
    weights: Sequence[float] | None = None,
    max_new_tokens: int = scoring.MAX_NEW_TOKENS,
) -> list[str]:
    """Return the answers to N inputs, of which each of M members gets a form of its own; see `answers`."""
    members = known_members(engine, mixtures)
    weight_M = member_weights(weights, len(members))
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise CompositionError("answers() need a tokenizer: make the Composer with tokenizer=...")
    in_orders = [member_task.in_orders() for member_task in tasks]
    orders = [len(ordered_tasks) for ordered_tasks in in_orders]
    repeated_members = [member for member, count in zip(members, orders, strict=True) for _ in range(count)]
    share_M = torch.tensor([float(w) / n for w, n in zip(weight_M, orders, strict=True) for _ in range(n)])
    routed = any(not isinstance(member, Mapping | MixtureWeights | None) for member in members)
    used = set() if routed else {name for member in members if member for name in getattr(member, "experts", member)}
    # experts that count from a place in the whole prompt on are like routers
    routed = routed or bool(engine.pool.invocations(used))
    shown = any(ordered_tasks[0].demonstrations for ordered_tasks in in_orders)
    with engine.activate(repeated_members):
        return scoring.predict_together(
            engine.model,
            tokenizer,
            [member_task for ordered_tasks in in_orders for member_task in ordered_tasks],
            share_M,
            [texts for texts, count in zip(inputs_MN, orders, strict=True) for _ in range(count)],
            max_new_tokens=max_new_tokens,
            share=shown and not routed,
        )


def _tasks_of(task: Task | Sequence[Task], count: int) -> list[Task]:
    tasks = [task] * count if isinstance(task, Task) else list(task)
    if len(tasks) != count:
        raise InvalidTask(f"there are {len(tasks)} tasks for {count} members; give one for all, or one for each")
    if different := [member_task.labels for member_task in tasks if member_task.labels != tasks[0].labels]:
        raise InvalidTask(f"the members' tasks have the labels {tasks[0].labels} and {different[0]}; give all the same")
    return tasks
