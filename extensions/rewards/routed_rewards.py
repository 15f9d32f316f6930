"""One of several rewards, chosen by the question's category: the outer mixture of DMoERM (Quan 2024, arXiv 2403.01197)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import Adapter, BaseModelMismatch, Composer, InvalidTask, WeightingError, base_key
from loraweave.extend import Whole, check_options, fingerprint
from loraweave.extend.composing import align_right, by_rows, rows_of
from loraweave.extend.models import base_id
from loraweave.extend.scoring import untouched
from loraweave.extend.training import LoraJobs, LoraSettings, target_layers, with_seed
from loraweave.extensions.rewards.reward_heads import (
    Epochs,
    HeadTraining,
    Pairs,
    features,
    learn,
    padded,
    row_features,
    text_features,
    text_ids,
)
from loraweave.extensions.rewards.reward_mixture import Member, RewardMixture, read_heads, trained_mixture, write_heads

FILE = "routed_rewards.safetensors"
ROUTER = "router"
TARGETS = ("q_proj", "v_proj")


class RoutedRewards(nn.Module):
    """A reward head for each category, and a router that predicts a question's category: argmax(W h + c).

    h is the last hidden state of the question's last token, of the base with the LoRA `adapter`, or without if None.
    """

    def __init__(self, heads: Mapping[str, RewardMixture], hidden_size: int, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.categories = tuple(heads)
        self.adapter = adapter
        self.outer = nn.Linear(hidden_size, len(heads))
        # names are free text, which modules' names cannot be
        self.heads = nn.ModuleList(heads.values())

    def categories_of(self, engine: Composer, batch: Mapping[str, Any]) -> list[str]:
        """Return the category of each row of a batch. Raises BaseModelMismatch for another base than the router's."""
        return [self.categories[place] for place in self._places(engine, batch).tolist()]

    def rewards(self, engine: Composer, batch: Mapping[str, Any], *, questions: Mapping[str, Any] | None = None) -> Tensor:
        """Return reward_B of a batch, each row by the head of its category, or of its question's if `questions` are given.

        Raises WeightingError for another number of questions, and what `categories_of` and the heads' `rewards` raise.
        """
        if questions is not None and rows_of(questions) != rows_of(batch):
            raise WeightingError(f"there are {rows_of(questions)} questions for {rows_of(batch)} rows: give one for each")
        place_B = self._places(engine, batch if questions is None else questions)
        reward_B = self.outer.weight.new_zeros(len(place_B))
        for place in sorted(set(place_B.tolist())):
            rows = (place_B == place).nonzero()[:, 0]
            head: Any = self.heads[place]
            some = by_rows(align_right(batch), lambda value, rows=rows: value[rows.to(value.device)])  # type: ignore[misc]
            reward_B[rows] = head.rewards(engine, some).to(reward_B)
        return reward_B

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write heads and router, with the router's LoRA as a PEFT folder inside, but not the members' adapters."""
        if self.adapter is not None:
            self.adapter.save_pretrained(Path(folder) / ROUTER)
        heads = {name: head.recipe for name, head in zip(self.categories, self.heads, strict=True)}  # type: ignore[union-attr]
        recipe = {"heads": heads, "hidden_size": self.outer.in_features, "adapted": self.adapter is not None}
        return write_heads(self, Path(folder) / FILE, recipe)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RoutedRewards:
        """Read rewards that save_pretrained wrote. Raises AdapterNotFound if they are missing, AdapterCorrupt if damaged."""

        def make(recipe: dict[str, Any]) -> RoutedRewards:
            adapter = Adapter.from_pretrained(Path(folder) / ROUTER) if recipe["adapted"] else None
            heads = {name: RewardMixture(**head) for name, head in recipe["heads"].items()}
            return cls(heads, recipe["hidden_size"], adapter)

        return read_heads(Path(folder) / FILE, make)

    @torch.no_grad()
    def _places(self, engine: Composer, batch: Mapping[str, Any]) -> Tensor:
        with self._adapted(engine.model):
            features_BH = features(engine, [None], batch)[0].to(self.outer.weight)
        found_B: Tensor = self.outer(features_BH).argmax(dim=1)
        return found_B

    def _adapted(self, model: nn.Module) -> AbstractContextManager[object]:
        """Give the model the router's adapter inside the block."""
        if self.adapter is None:
            return nullcontext()
        if why := self.adapter.base.differs(base_key(model)):
            raise BaseModelMismatch(f"the router of these rewards was trained on another base model: {why}")
        lora_settings = LoraSettings(rank=1, alpha=1.0)
        return LoraJobs(model, {}, [ROUTER], lora_settings, {ROUTER: self.adapter.layers})


def train_routed_rewards(
    engine: Composer,
    members: Mapping[str, Sequence[Member]],
    pairs: Mapping[str, Pairs],
    *,
    questions: Mapping[str, Sequence[str]] | None = None,
    rank: Whole = 8,
    target_modules: Sequence[str] = TARGETS,
    steps: int = 300,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> RoutedRewards:
    """Train RoutedRewards of the categories: each head learns from its category's pairs, the router from all `questions`.

    `members`, `pairs` and `questions` are by category; without questions the router learns from the texts of the pairs.
    Each head takes `steps` steps as `train_reward_mixture` does, and the router as many of AdamW on the cross-entropy of the
    category, over `batch_size` texts each. The published router is a language model of its own, trained as a whole, which
    reads questions alone; here it is the base with a LoRA of `rank` in `target_modules`. With rank 0 the base stays as it
    is, and W and c learn from all texts at once, in seconds.

    Raises WeightingError for categories without pairs or members, InvalidTask for a text of two categories and a category
    without questions, and what `train_reward_mixture` raises.
    """
    settings = HeadTraining(steps, lr, batch_size, seed)
    check_options("the training", {"rank": rank}, {"rank": Whole})
    if not members or set(members) != set(pairs):
        raise WeightingError(
            f"members are for the categories {list(members)} and pairs for {list(pairs)}: give both for each category"
        )
    category = _by_text(list(members), pairs, questions)
    layers = target_layers(engine.model, target_modules) if rank else {}
    heads = {name: trained_mixture(engine, mixtures, pairs[name], settings, progress) for name, mixtures in members.items()}
    hidden_size = next(iter(heads.values())).hidden_size
    routed = with_seed(seed, lambda: RoutedRewards(heads, hidden_size)).to(next(iter(heads.values())).outer.weight)
    jobs = LoraJobs(engine.model, layers, [ROUTER] if rank else [], LoraSettings(rank=max(rank, 1), alpha=16.0, seed=seed))
    _learn_categories(engine, routed, jobs, category, settings, progress)
    if rank:
        base = fingerprint(engine.model)
        routed.adapter = Adapter(ROUTER, base_id(engine.model), jobs.layers_of(ROUTER), base, {"categories": list(members)})
    return routed


def _by_text(
    names: Sequence[str], pairs: Mapping[str, Pairs], questions: Mapping[str, Sequence[str]] | None
) -> dict[str, int]:
    """Return {text: index of its category in `names`} of all texts that the router learns from."""
    if questions is not None and (lacking := [name for name in names if not questions.get(name)]):
        raise InvalidTask(f"category {lacking[0]!r} has no questions for the router to learn from: give some of each")
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        texts = [text for pair in pairs[name] for text in pair] if questions is None else questions[name]
        for text in texts:
            if places.setdefault(text, place) != place:
                raise InvalidTask(
                    f"text {text[:60]!r} has two categories, {names[places[text]]!r} and {name!r}: give it one"
                )
    return places


def _learn_categories(
    engine: Composer,
    found: RoutedRewards,
    jobs: LoraJobs,
    category: Mapping[str, int],
    settings: HeadTraining,
    progress: bool,
) -> None:
    """Train in place the router's linear map `found.outer`, and the LoRA of `jobs` if there is one.

    `category` is {text: index of its category}.
    """
    model, device = engine.model, found.outer.weight.device
    ids, category_N = text_ids(engine, list(category)), torch.tensor(list(category.values()), device=device)
    order = Epochs(len(ids), settings.seed)
    known_NH = None if jobs.members else text_features(engine, [None], list(category), progress=progress)[0]

    def next_loss() -> Tensor:
        if known_NH is not None:
            return functional.cross_entropy(found.outer(known_NH), category_N)
        chosen = order.next(settings.batch_size)
        rows = padded(engine.tokenizer, [ids[index] for index in chosen], next(model.parameters()).device)
        with jobs:
            features_NH = row_features(model, rows).to(found.outer.weight)
        return functional.cross_entropy(found.outer(features_NH), category_N[chosen])

    with untouched(model):
        learning = [*found.outer.parameters(), *jobs.parameters()]
        learn(learning, settings, next_loss, what="the router of categories", progress=progress)
