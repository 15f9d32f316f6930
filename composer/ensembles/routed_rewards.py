"""The outer mixture of DMoERM (Quan 2024, arXiv 2403.01197): each text's reward is that of its category's own head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.features import features, text_features
from loraweave.composer.ensembles.inputs import right_aligned
from loraweave.composer.ensembles.member_passes import rows_of
from loraweave.composer.ensembles.preferences import Pairs, Settings, seeded
from loraweave.composer.ensembles.reward_mixture import Member, RewardMixture, train_reward_mixture
from loraweave.errors import InvalidTask, WeightingError


class RoutedRewards(nn.Module):
    """A head for each category, and the linear classifier of the base's features that finds a text's category.

    The published router is a language model of its own that reads the question alone.
    """

    def __init__(self, heads: Mapping[str, RewardMixture], hidden_size: int) -> None:
        super().__init__()
        self.categories = tuple(heads)
        self.outer = nn.Linear(hidden_size, len(heads))
        # names are free text, which no module may have
        self.heads = nn.ModuleList(heads.values())

    def categories_of(self, engine: Composer, batch: Mapping[str, Any]) -> list[str]:
        """The category of each row of a batch."""
        return [self.categories[place] for place in self._places(engine, batch).tolist()]

    def rewards(self, engine: Composer, batch: Mapping[str, Any], *, questions: Mapping[str, Any] | None = None) -> Tensor:
        """reward_B of each row of a batch, by its category's head alone; of `questions`, where given, is the category.

        Raises WeightingError for another number of questions, and what the heads' `rewards` raise.
        """
        if questions is not None and rows_of(questions) != rows_of(batch):
            raise WeightingError(f"there are {rows_of(questions)} questions for {rows_of(batch)} rows: give one for each")
        place_B = self._places(engine, batch if questions is None else questions)
        reward_B = self.outer.weight.new_zeros(len(place_B))
        for place in sorted(set(place_B.tolist())):
            rows = (place_B == place).nonzero()[:, 0]
            head: Any = self.heads[place]
            reward_B[rows] = head.rewards(engine, _some_rows(batch, rows)).to(reward_B)
        return reward_B

    @torch.no_grad()
    def _places(self, engine: Composer, batch: Mapping[str, Any]) -> Tensor:
        features_BH = features(engine, [None], batch)[0].to(self.outer.weight)
        found_B: Tensor = self.outer(features_BH).argmax(dim=1)
        return found_B


def train_routed_rewards(
    engine: Composer,
    members: Mapping[str, Sequence[Member]],
    pairs: Mapping[str, Pairs],
    *,
    steps: int = 300,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> RoutedRewards:
    """RoutedRewards of the categories: each head learns from its category's pairs, the classifier from all their texts.

    `members` and `pairs` are by category. Each head takes `steps` steps as `train_reward_mixture` does, and the classifier
    as many of AdamW on the cross-entropy of all texts at once; model and adapters stay as they are.
    Raises WeightingError for categories without pairs or members, InvalidTask for a text of two categories, and what
    `train_reward_mixture` raises.
    """
    settings = Settings(steps, lr, batch_size, seed)
    if not members or set(members) != set(pairs):
        raise WeightingError(
            f"members are for the categories {list(members)} and pairs for {list(pairs)}: give both for each category"
        )
    category: dict[str, int] = {}
    for place, name in enumerate(members):
        for text in (text for pair in pairs[name] for text in pair):
            if category.setdefault(text, place) != place:
                other = list(members)[category[text]]
                raise InvalidTask(f"text {text[:60]!r} has two categories, {other!r} and {name!r}: give it one")
    heads = {
        name: train_reward_mixture(
            engine, own, pairs[name], steps=steps, lr=lr, batch_size=batch_size, seed=seed, progress=progress
        )
        for name, own in members.items()
    }
    features_NH = text_features(engine, [None], list(category), progress=progress)[0]
    routed = seeded(seed, lambda: RoutedRewards(heads, features_NH.shape[1])).to(features_NH)
    _fit_outer(routed.outer, features_NH, torch.tensor(list(category.values()), device=features_NH.device), settings)
    return routed


def _fit_outer(outer: nn.Linear, features_NH: Tensor, category_N: Tensor, settings: Settings) -> None:
    optimizer = torch.optim.AdamW(outer.parameters(), lr=settings.lr, weight_decay=0.0)
    with torch.enable_grad():
        for _ in range(settings.steps):
            loss = functional.cross_entropy(outer(features_NH), category_N)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _some_rows(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """These rows of a batch; what is no tensor by row stays what it is."""
    num_rows = rows_of(batch)
    return {
        key: value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() and len(value) == num_rows else value
        for key, value in right_aligned(batch).items()
    }
