"""Averaged probabilities of several mixtures: LoRA ensembles (Wang, Aitchison and Rudolph, 2023, arXiv 2310.00035).

The members are beside each other in one batch: the rows of one, then the next one's, each under its mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any

import torch
from torch import Tensor

from loraweave.common.chat import Prompt
from loraweave.common.checks import is_list, require_whole
from loraweave.common.options import Range, fits
from loraweave.common.rows import GivenRows, read_asked
from loraweave.composer.composer import Composer
from loraweave.composer.live.resolve import resolve
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import align_left, takes, tensors_in
from loraweave.composer.model.scoring import equal_shares, label_ids, label_losses
from loraweave.errors import CompositionError, InvalidTask, WeightingError
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

# positions follow from the first two; tokenizers say that a text has one segment
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# the most of one forward pass: bounds the memory of the layers, and that of the language head's output
MAX_TOKENS = 2**13
MAX_LOGITS = 2**26

Inputs = dict[str, Any]


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
    is the model's input by name (a tokenizer's output), padded on either side. `weights` are the members' shares, by default
    equal; they are divided by their sum. Probabilities are averaged, never logits or weights.

    The outcomes are the next token after each row's last one; with `num_positions=K` after each of its last K, on an axis of
    positions. `tokens` restricts each member's softmax to some token ids, `labels` to some texts by their summed
    log-likelihood after the row (after a space, and with the end of sequence, as Composition.predict ranks them); this needs
    the engine's tokenizer. The outcomes of a model that classifies rows are its classes.

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
    if num_positions is not None:
        require_whole("num_positions", num_positions, 1, CompositionError)
    ids = None if tokens is None else _token_ids(engine.model, tokens)
    if rows_per_pass is None:
        kept = _kept_positions(engine.model, batch, num_positions or 1)
        length = batch["input_ids"].shape[1] if "input_ids" in batch else 1
        num_words = int(getattr(engine.model.config.get_text_config(), "vocab_size", 1))
        rows_per_pass = rows_that_fit(batch, (length if kept is None else len(kept)) * num_words)
    read = partial(_next_tokens, engine.model, num_positions, ids)
    inputs, most = without_left_padding(engine.model, batch), min(rows_per_pass, num_rows * len(members))
    members_MBV = member_passes(engine, members, inputs, read, rows_per_pass=most)
    return EnsemblePrediction(members_MBV, weight_M, () if tokens is None else tuple(tokens))


def _label_members(
    engine: Composer, members: Sequence[Any], batch: Mapping[str, Any], labels: Sequence[str], rows_per_pass: int | None
) -> Tensor:
    """Return log p_MBL for M members and L labels: each member's softmax over the labels' summed log-likelihoods."""
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

    def read(inputs: Inputs) -> Tensor:
        losses_NL = label_losses(model, inputs["input_ids"], inputs["attention_mask"], [ids])
        return (-losses_NL).log_softmax(dim=1)

    return member_passes(engine, members, prefix, read, rows_per_pass=rows_per_pass)


def _next_tokens(model: Any, num_positions: int | None, tokens: Tensor | None, inputs: Inputs) -> Tensor:
    """Return the next token's log-probabilities, (B, K, V), or (B, V) if `num_positions` is None, from one call."""
    count, kept = num_positions or 1, _kept_positions(model, inputs, num_positions or 1)
    arguments = inputs if kept is None else {**inputs, "logits_to_keep": kept}
    logits = model(**without_cache(model, arguments)).logits
    if logits.dim() == 2 and num_positions is not None:
        raise CompositionError("this model classifies whole rows, and has no num_positions=")
    if logits.dim() > 2:
        if kept is None:
            name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
            place_BK = last_positions(inputs, count, logits.shape[1], name).to(logits.device)
        else:
            place_BK = last_positions(inputs, count, inputs["input_ids"].shape[1]).to(logits.device) - kept[0]
        logits = logits.gather(1, place_BK.expand(len(logits), -1)[:, :, None].expand(-1, -1, logits.shape[2]))
        logits = logits[:, 0] if num_positions is None else logits
    if tokens is not None:
        logits = logits[..., tokens.to(logits.device)]
    log_p: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return log_p


def _kept_positions(model: Any, inputs: Mapping[str, Any], count: int) -> Tensor | None:
    """Return the positions whose logits some row needs, for its last `count` tokens; None if the model must compute all."""
    if model.config.is_encoder_decoder or "input_ids" not in inputs or not takes(model, "logits_to_keep"):
        return None
    place_BK = last_positions(inputs, count, inputs["input_ids"].shape[1])
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

    `members_MBV` are the log-probabilities of each of M members for each row, with an axis of positions before the last if
    several were asked for; weight_M sums to 1. `outcomes` are the labels or token ids of the last axis, or empty if it is
    the whole vocabulary or the model's own classes. Entropies are in nats.
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

        With several positions a row has one entry for each, and the rows follow each other.
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
        """Return weight_M with axes of size 1, to be broadcast over `members_MBV`."""
        weight_M = self.weight_M.to(self.members_MBV)
        return weight_M.view(-1, *[1] * (self.members_MBV.dim() - 1))


def _entropy(probabilities: Tensor) -> Tensor:
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(dim=-1)


def last_positions(batch: Mapping[str, Any], count: int, length: int, mask_name: str = "attention_mask") -> Tensor:
    """Return place_BK, the positions of the last K = `count` real tokens in rows of `length`; without a mask all are real.

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
    """Return the batch, changed if need be so that padding before a row's tokens does not shift their positions.

    A decoder gets position ids from the mask, unless the batch has some; for any other model the padding moves to the end.
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
    """Return the inputs of a single call, with use_cache=False unless the batch sets it."""
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

    Decoding takes at each step the token of the highest average of the members' probabilities, and all members continue from
    it: p(y) is the product of these averages. Members run as rows of one batch with a cache of keys and values. A list of
    tasks, one for each member, gives each member prompts of its own, such as its own demonstrations. A member whose task has
    several `orders` answers in each, with an equal part of its share. `mixtures` and `weights` are those of `ensemble`;
    raises what it raises, CompositionError without a tokenizer, and InvalidTask for inputs that are neither texts nor rows,
    and for tasks that are fewer than the members or differ in labels.
    """
    texts = read_asked(inputs)
    tasks = [task] * len(mixtures) if isinstance(task, Task) else list(task)
    if len(tasks) != len(mixtures):
        raise InvalidTask(f"there are {len(tasks)} tasks for {len(mixtures)} members; give one for all, or one for each")
    if different := [member_task.labels for member_task in tasks if member_task.labels != tasks[0].labels]:
        raise InvalidTask(f"the members' tasks have the labels {tasks[0].labels} and {different[0]}; give all the same")
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
    """Return the answers to N inputs; each of M members gets its own text for each, inputs_MN; see `answers`."""
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
    # experts whose weight begins at their invocation tokens need the whole prompt, as routers do
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


def member_passes(
    engine: Composer,
    mixtures: Sequence[Any],
    batch: Mapping[str, Any],
    read: Callable[[Inputs], Tensor],
    *,
    rows_per_pass: int,
) -> Tensor:
    """Return `read(inputs)` for the rows of each of M members, (M, B, ...); `read` runs the model, its result is by row.

    Several members share a forward pass where `rows_per_pass` lets them; a batch above it is run in parts. Tensors of the
    batch whose first axis has its number of rows are laid out by row, all else is passed on as it is. Raises
    CompositionError for inputs that are neither by row nor shared: a cache, several images for a text.
    """
    num_rows = rows_of(batch)
    tensors = tensors_of(batch)
    for key, value in batch.items():
        odd = key in tensors and value.dim() > 1 and len(value) not in (1, num_rows)
        if odd or (key in ("past_key_values", "cache") and value is not None):
            what = f"shape {tuple(value.shape)}" if odd else type(value).__name__
            raise CompositionError(
                f"{key!r} of the batch ({what}) cannot be given to each member's {num_rows} rows: give inputs that have as "
                "many rows as the batch, and no cache"
            )
    members_per_pass = max(1, rows_per_pass // num_rows)
    parts = []
    with torch.no_grad():
        for row in range(0, num_rows, rows_per_pass):
            size = min(rows_per_pass, num_rows - row)
            member_values = []
            for member in range(0, len(mixtures), members_per_pass):
                some = list(mixtures[member : member + members_per_pass])
                with engine.activate(some):
                    values = read(by_rows(batch, partial(repeated, count=len(some), rows=slice(row, row + size))))
                member_values.append(values.view(len(some), size, *values.shape[1:]))
            parts.append(torch.cat(member_values))
    return torch.cat(parts, dim=1)


def known_members(engine: Composer, mixtures: Sequence[Any]) -> list[Any]:
    """Return the members in a form that activate() takes for a row. Raises WeightingError or UnknownExpert."""
    if not is_list(mixtures) or not mixtures:
        raise WeightingError(
            f"the members of an ensemble are a list of at least one mixture, not {mixtures!r}; put a single one into a list"
        )
    for number, mixture in enumerate(mixtures):
        if isinstance(mixture, str | list | tuple):
            raise WeightingError(
                f"member {number} of the ensemble is {mixture!r}; a member is one mixture for all rows: {{name: weight}}, "
                "None for the base, MixtureWeights of one row, or a router"
            )
    if not isinstance(engine, Composer):
        raise WeightingError(
            f"an ensemble mixes the experts of a Composer, and {engine!r:.80} is not one: pass lw.Composer(model, pool)"
        )
    # weights that all layers share by name: such members mix as one set of rows
    members = [
        mixture.as_dict()
        if isinstance(mixture, MixtureWeights) and mixture.scope == "task" and not mixture.layers
        else mixture
        for mixture in mixtures
    ]
    resolve(members, engine.pool, engine.bound_pool)
    return members


def member_weights(weights: Sequence[float] | None, num_members: int) -> Tensor:
    """Return weight_M, fp64, of sum 1; None is equal weights. Raises WeightingError unless they are shares."""
    if weights is None:
        return equal_shares(num_members)
    weight_M = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if len(weight_M) != num_members:
        raise WeightingError(f"there are {len(weight_M)} weights for {num_members} members; give one for each")
    if not bool(torch.isfinite(weight_M).all()) or bool((weight_M < 0).any()) or not float(weight_M.sum()) > 0:
        raise WeightingError(
            f"the members' weights are {weight_M.tolist()}; they are shares of an average: at least 0, and not all 0"
        )
    return weight_M / weight_M.sum()


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the batch's tensors that have an axis, by name."""
    return {key: value for key, value in tensors_in(batch).items() if value.dim()}


def rows_of(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of the model's inputs. Raises CompositionError if there are none."""
    for value in tensors_of(batch).values():
        if len(value):
            return len(value)
    raise CompositionError("the batch has no tensor with rows; give the model's inputs, as a tokenizer returns them")


def by_rows(batch: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the batch with `change` applied to the tensors that have its rows; all else is passed on as it is."""
    num_rows = rows_of(batch)
    changed = {key: change(value) for key, value in tensors_of(batch).items() if len(value) == num_rows}
    return {**batch, **changed}


def repeated(tensor: Tensor, count: int, rows: slice = slice(None)) -> Tensor:
    """Return the chosen rows of a tensor, the whole sequence of them repeated `count` times."""
    return tensor[rows].repeat(count, *[1] * (tensor.dim() - 1))


def rows_that_fit(batch: Mapping[str, Any], logits_per_row: int, *, copies: int = 1) -> int:
    """Return the number of rows for one forward pass, by the tokens of the longest input and the logits of a row.

    `copies` is how many rows of a key-value cache each row becomes.
    """
    num_tokens = max(value[0].numel() for value in tensors_of(batch).values())
    return max(1, min(MAX_TOKENS // (num_tokens * copies), MAX_LOGITS // logits_per_row))
