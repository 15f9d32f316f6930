"""Reward heads learned from preferences: features are made once, and only what reads them is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.features import text_features
from loraweave.composer.ensembles.member_passes import known_members
from loraweave.errors import InvalidTask, TrainingError
from loraweave.hub.progress import progress_bar
from loraweave.hub.whole_number import require_whole

T = TypeVar("T")
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Settings:
    """How a head is trained. Raises TrainingError for values out of range."""

    steps: int
    lr: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name, value in {"steps": self.steps, "batch_size": self.batch_size}.items():
            require_whole(name, value, 1, TrainingError)
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise TrainingError(f"lr is {self.lr!r}; it must be above 0")


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
    """A linear head for each member, which starts from its own seed, for `rewards(heads=...)`.

    A pair is (the text that is preferred, the other one). Each head alone takes `steps` steps of AdamW without weight decay
    on the pairwise logistic loss -log sigmoid(r(preferred) - r(other)), over `batch_size` pairs in shuffled epochs. Model
    and adapters stay as they are.
    Raises InvalidTask for pairs that are none, TrainingError for settings out of range and for a loss that is not finite.
    """
    settings = Settings(steps, lr, batch_size, seed)
    preferred_MNH, other_MNH = pair_features(engine, mixtures, pairs, progress=progress)
    heads = []
    for member, (preferred_NH, other_NH) in enumerate(zip(preferred_MNH, other_MNH, strict=True)):
        own = replace(settings, seed=seed + member)
        head = seeded(own.seed, lambda: nn.Linear(preferred_MNH.shape[2], 1)).to(preferred_NH)
        fit(head, preferred_NH[None], other_NH[None], own, progress=progress)
        heads.append(head)
    return heads


def pair_features(engine: Composer, mixtures: Sequence[Any], pairs: Pairs, *, progress: bool) -> tuple[Tensor, Tensor]:
    """(preferred_MNH, other_MNH): features of both texts of each pair, each text run once under each member."""
    require_pairs(pairs)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    place = {text: index for index, text in enumerate(texts)}
    found_MNH = text_features(engine, known_members(engine, mixtures), texts, progress=progress)
    preferred, other = ([place[pair[side]] for pair in pairs] for side in (0, 1))
    return found_MNH[:, preferred], found_MNH[:, other]


def require_pairs(pairs: Pairs) -> None:
    """Raises InvalidTask for pairs that are none."""
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InvalidTask(f"pair {number} is {pair!r}, not two texts: the preferred one, and the other")
        if pair[0] == pair[1]:
            raise InvalidTask(f"pair {number} prefers {pair[0][:60]!r} to itself")
    if not pairs:
        raise InvalidTask("there are no pairs to learn a preference from")


def fit(head: nn.Module, preferred_MNH: Tensor, other_MNH: Tensor, settings: Settings, *, progress: bool) -> None:
    """Trains a head of features_MBH (M may be 1) on pairs of features, in place."""
    order = Epochs(preferred_MNH.shape[1], settings.seed)

    def next_loss() -> Tensor:
        chosen = order.next(settings.batch_size)
        margin_N = head(preferred_MNH[:, chosen]) - head(other_MNH[:, chosen])
        return functional.softplus(-margin_N).mean()

    descend(head.parameters(), settings, next_loss, what="the reward head", progress=progress)


def descend(
    parameters: Iterable[nn.Parameter], settings: Settings, next_loss: Callable[[], Tensor], *, what: str, progress: bool
) -> None:
    """Takes the settings' steps of AdamW without weight decay, each down the gradient of the next loss.

    Raises TrainingError for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    with torch.enable_grad(), progress_bar(progress, field="loss") as bar:
        shown = bar.add_task(f"training {what}", total=settings.steps, loss="")
        for step in range(settings.steps):
            loss = next_loss()
            if not math.isfinite(float(loss.detach())):
                raise TrainingError(f"the loss is {float(loss.detach())} at step {step + 1}; lower lr ({settings.lr:g})")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update(shown, advance=1, loss=f"loss {float(loss.detach()):.3f}")


def seeded(seed: int, make: Callable[[], T]) -> T:
    """make(), with torch's random numbers of that seed; those of the caller go on as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class Epochs:
    """Indices in shuffled epochs, a function of the seed alone."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def next(self, count: int) -> list[int]:
        while len(self._waiting) < count:
            self._waiting += torch.randperm(self._size, generator=self._generator).tolist()
        chosen, self._waiting = self._waiting[:count], self._waiting[count:]
        return chosen
