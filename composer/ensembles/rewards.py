"""Rewards of several mixtures, and conservative ways to make one of them.

Coste et al., 2023 (arXiv 2310.02743) call the minimum WCO and the mean less lambda variances UWO; UP-RLHF (Zhai et al.,
2024, arXiv 2401.00243) takes the mean less eta standard deviations. Members that are LoRAs on one base, with a head each or
one for all, are the ensembles of Zhang et al., 2024 (arXiv 2401.16635).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.features import features
from loraweave.composer.ensembles.inputs import right_aligned, without_cache
from loraweave.composer.ensembles.member_passes import known_members, member_passes, rows_that_fit
from loraweave.errors import CompositionError, UnknownName, WeightingError
from loraweave.hub.names import near_misses


@dataclass(frozen=True, eq=False)
class Rewards:
    """rewards_MB: each member's reward for each row."""

    rewards_MB: Tensor

    @property
    def mean_B(self) -> Tensor:
        return self.rewards_MB.mean(dim=0)

    @property
    def variance_B(self) -> Tensor:
        """The mean of the squared distances from the mean: divided by M, as the paper's UWO has it, so one member has 0."""
        return self.rewards_MB.var(dim=0, correction=0)

    @property
    def std_B(self) -> Tensor:
        return self.variance_B.sqrt()

    def aggregated(self, by: str = "mean", *, penalty: float = 1.0) -> Tensor:
        """reward_B: "mean", "min", "mean_minus_std" or "mean_minus_variance", less `penalty` times either.

        Raises UnknownName for another way, WeightingError for a penalty that is negative or not finite.
        """
        if by not in _WAYS:
            close = near_misses(by, _WAYS)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise UnknownName(f"no way {by!r} to aggregate rewards{hint}; there are {', '.join(_WAYS)}")
        if not math.isfinite(penalty) or penalty < 0:
            raise WeightingError(f"penalty is {penalty!r}; it must be a finite number of at least 0")
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
    """Each member's reward for each row of a batch; members and batch are those of `ensemble`.

    A reward is what a head makes of the last hidden state of a row's last token: the model's own (a sequence classifier with
    one label), or `heads`, one for all members or one for each, which map (B, H) to (B, 1) or (B,).
    Raises what `ensemble` raises, WeightingError for heads that are not as many as the members, CompositionError for a model
    without a head of one label and for heads of another shape.
    """
    members = known_members(engine, mixtures)
    if heads is None:
        return Rewards(_own_rewards(engine, members, batch, rows_per_pass))
    each = [heads] * len(members) if isinstance(heads, nn.Module) else list(heads)
    if len(each) != len(members):
        raise WeightingError(f"there are {len(each)} heads for {len(members)} members; give one for each, or one for all")
    features_MBH = features(engine, members, batch, rows_per_pass=rows_per_pass)
    return Rewards(head_rewards(each, features_MBH))


@torch.no_grad()
def head_rewards(heads: Sequence[nn.Module], features_MBH: Tensor) -> Tensor:
    """rewards_MB of a head for each member. CompositionError for heads that give something else than a number a row."""
    found = []
    for number, (head, features_BH) in enumerate(zip(heads, features_MBH, strict=True)):
        reward = head(features_BH)
        if reward.shape not in ((len(features_BH),), (len(features_BH), 1)):
            raise CompositionError(
                f"head {number} makes {tuple(reward.shape)} of features {tuple(features_BH.shape)}; give one number a row"
            )
        found.append(reward.reshape(-1))
    return torch.stack(found)


def _own_rewards(engine: Composer, members: Sequence[Any], batch: Mapping[str, Any], rows_per_pass: int | None) -> Tensor:
    fitting = rows_that_fit(batch, 1) if rows_per_pass is None else rows_per_pass
    if getattr(engine.model.config, "num_labels", None) != 1 or engine.model.can_generate():  # type: ignore[operator]
        raise CompositionError(
            f"{type(engine.model).__name__} has no head that gives one reward: load it as a sequence classifier with "
            "num_labels=1, or pass heads="
        )

    def read(inputs: dict[str, Any]) -> Tensor:
        logits_N1: Tensor = engine.model(**without_cache(engine.model, inputs)).logits
        return logits_N1.to(torch.promote_types(logits_N1.dtype, torch.float32))[:, 0]

    return member_passes(engine, members, right_aligned(batch), read, rows_per_pass=fitting)
