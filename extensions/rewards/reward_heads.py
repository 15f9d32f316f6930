"""Rewards by several mixtures, and conservative ways to aggregate them into one.

Coste et al., 2023 (arXiv 2310.02743) call the minimum WCO and the mean less lambda variances UWO; UP-RLHF (Zhai et al.,
2024, arXiv 2401.00243) takes the mean less eta standard deviations. Members that are LoRAs on one base, with a head each or
one for all, are the ensembles of Zhang et al., 2024 (arXiv 2401.16635).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import Composer, CompositionError, InvalidTask, TrainingError, UnknownName, WeightingError
from loraweave.extend import Count, NonNegative, Positive, check_options, is_list, nearest, options_of, progress_bar, tracked
from loraweave.extend.composing import (
    align_right,
    known_members,
    last_positions,
    member_passes,
    rows_that_fit,
    without_cache,
)
from loraweave.extend.scoring import last_logits, pad_rows
from loraweave.extend.training import Descent, descend, with_seed


@dataclass(frozen=True, eq=False)
class Rewards:
    """The rewards of M members for B rows, `rewards_MB`."""

    rewards_MB: Tensor

    @property
    def mean_B(self) -> Tensor:
        return self.rewards_MB.mean(dim=0)

    @property
    def variance_B(self) -> Tensor:
        """The variance over members, divided by M (not M - 1) as in the paper's UWO, so that it is 0 for a single member."""
        return self.rewards_MB.var(dim=0, correction=0)

    @property
    def std_B(self) -> Tensor:
        return self.variance_B.sqrt()

    def aggregated(self, by: str = "mean", *, penalty: float = 1.0) -> Tensor:
        """Return reward_B by the members' "mean" or "min", or by the mean less `penalty` times the std or variance.

        The latter are "mean_minus_std" and "mean_minus_variance".
        Raises UnknownName for any other `by`, WeightingError for a penalty that is negative or not finite.
        """
        if by not in _WAYS:
            raise UnknownName(f"no way {by!r} to aggregate rewards{nearest(by, _WAYS)}; there are {', '.join(_WAYS)}")
        check_options("aggregated()", {"penalty": penalty}, {"penalty": NonNegative})
        return _WAYS[by](self, penalty)


_WAYS: dict[str, Callable[[Rewards, float], Tensor]] = {
    "mean": lambda rewards, _: rewards.mean_B,
    "min": lambda rewards, _: rewards.rewards_MB.amin(dim=0),
    "mean_minus_std": lambda rewards, eta: rewards.mean_B - eta * rewards.std_B,
    "mean_minus_variance": lambda rewards, weight: rewards.mean_B - weight * rewards.variance_B,
}


def rewards(
    engine: Composer,
    mixtures: Sequence[Any],
    batch: Mapping[str, Any],
    *,
    heads: nn.Module | Sequence[nn.Module] | None = None,
    rows_per_pass: int | None = None,
) -> Rewards:
    """Return each member's reward for each row of a batch; members and batch are those of `ensemble`.

    A head maps the last hidden state of a row's last token to its reward: the model's own (a sequence classifier with
    one label), or `heads`, one for all members or one for each, which map (B, H) to (B, 1) or (B,).
    Raises what `ensemble` raises, WeightingError for heads that are not as many as the members, CompositionError for a model
    without a head of one label and for heads of another shape.
    """
    members = known_members(engine, mixtures)
    if heads is None:
        return Rewards(_own_rewards(engine, members, batch, rows_per_pass))
    member_heads = [heads] * len(members) if isinstance(heads, nn.Module) else list(heads)
    if len(member_heads) != len(members):
        raise WeightingError(
            f"there are {len(member_heads)} heads for {len(members)} members; give one for each, or one for all"
        )
    features_MBH = features(engine, members, batch, rows_per_pass=rows_per_pass)
    return Rewards(head_rewards(member_heads, features_MBH))


@torch.no_grad()
def head_rewards(heads: Sequence[nn.Module], features_MBH: Tensor) -> Tensor:
    """Return rewards_MB, one head for each member. Raises CompositionError for a head without one number per row."""
    member_rewards = []
    for number, (head, features_BH) in enumerate(zip(heads, features_MBH, strict=True)):
        reward = head(features_BH)
        if reward.shape not in ((len(features_BH),), (len(features_BH), 1)):
            raise CompositionError(
                f"head {number} makes {tuple(reward.shape)} of features {tuple(features_BH.shape)}; give one number a row"
            )
        member_rewards.append(reward.reshape(-1))
    return torch.stack(member_rewards)


def _own_rewards(engine: Composer, members: Sequence[Any], batch: Mapping[str, Any], rows_per_pass: int | None) -> Tensor:
    model: Any = engine.model
    require_reward_head(model, ", or pass heads=")
    return _passes(engine, members, batch, rows_per_pass, lambda inputs: own_reward(model(**without_cache(model, inputs))))


def require_reward_head(model: Any, beside: str = "") -> None:
    """Raise CompositionError, which ends in the text `beside`, for a model without a head of one label."""
    if getattr(model.config, "num_labels", None) != 1 or model.can_generate():
        raise CompositionError(
            f"{type(model).__name__} has no head that gives one reward: load it as a sequence classifier with "
            f"num_labels=1{beside}"
        )


def own_reward(output: Any) -> Tensor:
    """Return reward_N from a classifier's output with one logit per row, in fp32 or better."""
    logits_N1: Tensor = output.logits
    return logits_N1.to(torch.promote_types(logits_N1.dtype, torch.float32))[:, 0]


def _passes(
    engine: Composer,
    members: Sequence[Any],
    batch: Mapping[str, Any],
    rows_per_pass: int | None,
    read: Callable[[dict[str, Any]], Tensor],
) -> Tensor:
    fitting = rows_that_fit(batch, 1) if rows_per_pass is None else rows_per_pass
    return member_passes(engine, members, align_right(batch), read, rows_per_pass=fitting)


TEXTS_PER_BATCH = 32


def features(
    engine: Composer, mixtures: Sequence[Any], batch: Mapping[str, Any], *, rows_per_pass: int | None = None
) -> Tensor:
    """Return features_MBH in fp32 or better: the last hidden state of each row's last real token, under each member.

    For an encoder-decoder they are the decoder's. Members and batch are those of `ensemble`; padding may be on either side.
    Raises what `ensemble` raises, and CompositionError for a model that returns no hidden state.
    """
    return _passes(engine, known_members(engine, mixtures), batch, rows_per_pass, partial(row_features, engine.model))


def row_features(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return features_NH in fp32 or better: each row's last hidden state at its last real token, with the active mixture."""
    hidden_NTH = _last_hidden(model, inputs)
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    place_N = last_positions(inputs, 1, hidden_NTH.shape[1], name)[:, 0].to(hidden_NTH.device)
    found_NH = hidden_NTH[torch.arange(len(hidden_NTH), device=hidden_NTH.device), place_N]
    return found_NH.to(torch.promote_types(found_NH.dtype, torch.float32))


def text_features(engine: Composer, mixtures: Sequence[Any], texts: Sequence[str], *, progress: bool = True) -> Tensor:
    """Return features_MNH of N texts under M members, each run once, in batches of similar length.

    Raises CompositionError without a tokenizer, InvalidTask without texts and for one without tokens.
    """
    ids = text_ids(engine, texts)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    starts = range(0, len(order), TEXTS_PER_BATCH)
    parts = []
    for start in tracked(starts, "features", total=len(starts), shown=progress):
        rows = [ids[index] for index in order[start : start + TEXTS_PER_BATCH]]
        parts.append(features(engine, mixtures, padded(engine.tokenizer, rows, next(engine.model.parameters()).device)))
    place_N = torch.tensor(order).argsort()
    return torch.cat(parts, dim=1)[:, place_N.to(parts[0].device)]


def text_ids(engine: Composer, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts. Raises what `text_features` raises."""
    if engine.tokenizer is None:
        raise CompositionError("texts need a tokenizer: make the Composer with tokenizer=...")
    ids = [list(row) for row in engine.tokenizer(list(texts))["input_ids"]] if texts else []
    if not ids or not all(ids):
        raise InvalidTask(f"text {ids.index([]) + 1} has no tokens" if ids else "there are no texts")
    return ids


def _last_hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the last layer's hidden_NTH, without keeping other layers' states or logits of whole texts."""
    seen: list[Tensor | None] = []

    def see(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(getattr(output, "last_hidden_state", None))

    # an encoder-decoder may have no module that is the model without its head
    body = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    with body.register_forward_hook(see):
        model(**without_cache(model, {**inputs, **last_logits(model)}))
    if not seen or seen[-1] is None:
        raise CompositionError(f"{type(body).__name__} gives no last_hidden_state to read features from")
    return seen[-1]


def padded(tokenizer: Any, rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Return rows of token ids as {"input_ids", "attention_mask"} on `device`, padded on the right."""
    ids_BT, mask_BT = pad_rows(tokenizer, rows, left=False)
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}


Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class HeadTraining:
    """The settings of training a head. Raises TrainingError for values out of range."""

    steps: Count
    lr: Positive
    batch_size: Count
    seed: int

    def __post_init__(self) -> None:
        check_options("the training", vars(self), options_of(HeadTraining), noun="setting", error=TrainingError)


def train_reward_heads(
    engine: Composer,
    mixtures: Sequence[Any],
    pairs: Pairs,
    *,
    steps: int = 300,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> list[nn.Linear]:
    """Train a linear head for each member, which starts from its own seed, for `rewards(heads=...)`; return the heads.

    A pair is (the text that is preferred, the other one). Each head alone takes `steps` steps of AdamW without weight decay
    on the pairwise logistic loss -log sigmoid(r(preferred) - r(other)), over `batch_size` pairs in shuffled epochs. Model
    and adapters stay as they are.
    Raises InvalidTask for invalid pairs, TrainingError for settings out of range and for a loss that is not finite.
    """
    settings = HeadTraining(steps, lr, batch_size, seed)
    preferred_MNH, other_MNH = pair_features(engine, mixtures, pairs, progress=progress)
    heads = []
    for member, (preferred_NH, other_NH) in enumerate(zip(preferred_MNH, other_MNH, strict=True)):
        member_settings = replace(settings, seed=seed + member)
        head = with_seed(member_settings.seed, lambda: nn.Linear(preferred_MNH.shape[2], 1)).to(preferred_NH)
        fit(head, preferred_NH[None], other_NH[None], member_settings, progress=progress)
        heads.append(head)
    return heads


def pair_features(engine: Composer, mixtures: Sequence[Any], pairs: Pairs, *, progress: bool) -> tuple[Tensor, Tensor]:
    """Return (preferred_MNH, other_MNH): features of both texts of each pair, each text run once under each member."""
    require_pairs(pairs)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    place = {text: index for index, text in enumerate(texts)}
    features_MNH = text_features(engine, known_members(engine, mixtures), texts, progress=progress)
    preferred, other = ([place[pair[side]] for pair in pairs] for side in (0, 1))
    return features_MNH[:, preferred], features_MNH[:, other]


def require_pairs(pairs: Pairs) -> None:
    """Raise InvalidTask unless there is a pair, and every pair is two different texts."""
    for number, pair in enumerate(pairs, start=1):
        if not is_list(pair, str) or len(pair) != 2:
            raise InvalidTask(f"pair {number} is {pair!r}, not two texts: the preferred one, and the other")
        if pair[0] == pair[1]:
            raise InvalidTask(f"pair {number} prefers {pair[0][:60]!r} to itself")
    if not pairs:
        raise InvalidTask("there are no pairs to learn a preference from")


def fit(head: nn.Module, preferred_MNH: Tensor, other_MNH: Tensor, settings: HeadTraining, *, progress: bool) -> None:
    """Train in place a head that maps features_MBH to one reward per row, on N pairs of features (M may be 1)."""
    order = Epochs(preferred_MNH.shape[1], settings.seed)

    def next_loss() -> Tensor:
        chosen = order.next(settings.batch_size)
        margin_N = head(preferred_MNH[:, chosen]) - head(other_MNH[:, chosen])
        return functional.softplus(-margin_N).mean()

    learn(head.parameters(), settings, next_loss, what="the reward head", progress=progress)


def learn(
    parameters: Iterable[Tensor], settings: HeadTraining, next_loss: Callable[[], Tensor], *, what: str, progress: bool
) -> None:
    """Train the parameters for the settings' steps of AdamW without weight decay, each on the loss that `next_loss` returns.

    `what` is the title of the progress bar. Raises TrainingError for a loss that is not finite.
    """
    descent = Descent(parameters, lambda _: settings.lr, limit=None)
    with torch.enable_grad(), progress_bar(progress, field="loss") as bar:
        descend({what: descent}, lambda _: next_loss(), settings.steps, bar, title=f"training {what}")


class Epochs:
    """An endless sequence of the indices 0 .. size - 1, shuffled anew each epoch by the seed."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def next(self, count: int) -> list[int]:
        while len(self._waiting) < count:
            self._waiting += torch.randperm(self._size, generator=self._generator).tolist()
        chosen, self._waiting = self._waiting[:count], self._waiting[count:]
        return chosen
