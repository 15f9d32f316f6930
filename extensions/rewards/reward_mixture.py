"""One reward from the features of several mixtures: the inner mixture of DMoERM (Quan, 2024, arXiv 2403.01197).

The last hidden states of T members beside each other go through Linear(T h -> h), PReLU and Linear(h -> 1).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from loraweave import (
    AdapterCorrupt,
    AdapterNotFound,
    Composer,
    CompositionError,
    InvalidTask,
    TrainingError,
    UnknownName,
    WeightingError,
)
from loraweave.extend import nearest, storage_errors, whole_file
from loraweave.extend.composing import align_right, by_rows, known_members, rows_of, without_cache
from loraweave.extend.recipes import ExpertModel, require_expert_model
from loraweave.extend.training import save_tensors, with_seed
from loraweave.extensions.rewards.reward_heads import (
    Epochs,
    HeadTraining,
    Pairs,
    Rewards,
    features,
    fit,
    learn,
    own_reward,
    padded,
    pair_features,
    require_pairs,
    require_reward_head,
)

FORMAT = 1
FILE = "reward_mixture.safetensors"

Member = Mapping[str, float] | None


class RewardMixture(nn.Module):
    """The map from features_MBH of the members, in their order, to reward_B: column block m of `inner.weight` is member m's.

    A member is {name: weight}, or None for the base. `hashes` are those of the adapters that it was trained with, by name.
    """

    def __init__(self, members: Sequence[Member], hidden_size: int, *, hashes: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.members = tuple(members)
        self.hidden_size = hidden_size
        self.hashes = dict(hashes or {})
        self.inner = nn.Linear(len(self.members) * hidden_size, hidden_size)
        self.activation = nn.PReLU()
        self.outer = nn.Linear(hidden_size, 1)

    def forward(self, features_MBH: Tensor) -> Tensor:
        features_BF = features_MBH.transpose(0, 1).flatten(1)
        reward_B1: Tensor = self.outer(self.activation(self.inner(features_BF)))
        return reward_B1[:, 0]

    def rewards(self, engine: Composer, batch: Mapping[str, Any]) -> Tensor:
        """Return reward_B of a batch, {name of a model's argument: tensor} with padding on either side.

        Raises UnknownExpert for a member missing from the engine's pool, CompositionError for another adapter of its name.
        """
        members = known_members(engine, self.members)
        for name, known in self.hashes.items():
            if engine.pool.adapters[name].hash != known:
                raise CompositionError(
                    f"expert {name!r} is another adapter than the one that this reward mixture was trained with "
                    f"(content {engine.pool.adapters[name].hash[:12]}, not {known[:12]}); give the engine that one"
                )
        with torch.no_grad():
            return self(features(engine, members, batch).to(self.outer.weight))  # type: ignore[no-any-return]

    @property
    def recipe(self) -> dict[str, Any]:
        """The constructor's arguments as JSON: {"members", "hidden_size", "hashes"}."""
        members = [None if member is None else dict(member) for member in self.members]
        return {"members": members, "hidden_size": self.hidden_size, "hashes": self.hashes}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the head with its members' names, weights and hashes, without the adapters; return the folder."""
        return write_heads(self, Path(folder) / FILE, self.recipe)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RewardMixture:
        """Read a head that save_pretrained wrote. Raises AdapterNotFound if it is missing, AdapterCorrupt if damaged."""
        return read_heads(Path(folder) / FILE, lambda recipe: cls(**recipe))


def write_heads(heads: nn.Module, target: Path, recipe: Mapping[str, Any]) -> Path:
    """Write the module's tensors with the recipe to the file `target`, whole or not at all; return its folder."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in heads.state_dict().items()}
    with storage_errors(target, "saving a reward mixture"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary:
            save_tensors(tensors, temporary, metadata={"loraweave": json.dumps({"format": FORMAT, **recipe})})
    return target.parent


H = TypeVar("H", bound=nn.Module)


def read_heads(path: Path, make: Callable[[dict[str, Any]], H]) -> H:
    """Return the module that `make` builds from the recipe, with the tensors of the file.

    Raises AdapterNotFound without a file, AdapterCorrupt for one that is damaged, CompositionError for another format.
    """
    if not path.is_file():
        raise AdapterNotFound(f"{path.parent} holds no {path.name}; save_pretrained() of such rewards writes it")
    try:
        with safe_open(path, framework="pt") as file:
            recipe = json.loads((file.metadata() or {})["loraweave"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if (found_format := recipe.pop("format")) != FORMAT:
            raise CompositionError(f"{path} has format {found_format}, but this version reads {FORMAT}")
        heads = make(recipe)
        heads.to(tensors["outer.weight"]).load_state_dict(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AdapterCorrupt(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return heads


def train_reward_mixture(
    engine: Composer,
    mixtures: Sequence[Any],
    pairs: Pairs,
    *,
    steps: int = 300,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> RewardMixture:
    """Return a RewardMixture of the members, trained on pairs (preferred text, other text) with model and adapters frozen.

    Every text is run once under each member; then `steps` steps of AdamW without weight decay on the pairwise logistic loss
    -log sigmoid(r(preferred) - r(other)), over `batch_size` pairs in shuffled epochs. Members are mappings, None, or
    MixtureWeights of task scope that all layers share, so that they can be written down.
    Raises WeightingError for other members, InvalidTask for invalid pairs, TrainingError for settings out of range and
    for a loss that is not finite.
    """
    return trained_mixture(engine, mixtures, pairs, HeadTraining(steps, lr, batch_size, seed), progress)


def trained_mixture(
    engine: Composer, mixtures: Sequence[Any], pairs: Pairs, settings: HeadTraining, progress: bool
) -> RewardMixture:
    """Train a reward mixture like `train_reward_mixture`, with settings that were already checked."""
    members = known_members(engine, mixtures)
    for number, member in enumerate(members):
        if not (member is None or isinstance(member, Mapping)):
            raise WeightingError(
                f"member {number} is a {type(member).__name__}; a reward mixture keeps {{name: weight}} or None"
            )
    names = {name for member in members if member for name in member}
    hashes = {name: engine.pool.adapters[name].hash for name in sorted(names)}
    preferred_MNH, other_MNH = pair_features(engine, members, pairs, progress=progress)
    head = with_seed(settings.seed, lambda: RewardMixture(members, preferred_MNH.shape[2], hashes=hashes)).to(preferred_MNH)
    fit(head, preferred_MNH, other_MNH, settings, progress=progress)
    return head


def expert_rewards(model: ExpertModel, batch: Mapping[str, Any]) -> Rewards:
    """Return the reward by each task's expert for each row of a batch, with padding on either side, from one pass.

    Raises CompositionError for a base without a head of one label.
    """
    _require_reward_model(model)
    num_experts, num_rows = len(model.tasks), rows_of(batch)
    inputs = by_rows(align_right(batch), lambda value: value.repeat(num_experts, *[1] * (value.dim() - 1)))
    experts = [expert for expert in range(num_experts) for _ in range(num_rows)]
    return Rewards(_rewards(model, inputs, experts).view(num_experts, num_rows))


def train_reward_experts(
    model: ExpertModel,
    pairs: Pairs | Mapping[str, Pairs],
    *,
    steps: int = 300,
    lr: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> ExpertModel:
    """Train the model's experts on pairs of (the text that is preferred, the other one); return the model. The base stays.

    `pairs` are for all experts, as an ensemble's members learn, or {task: pairs} for each one's own, as the capability
    points of DMoERM do. Each step takes AdamW without weight decay down the mean over `batch_size` pairs, in shuffled
    epochs, of -log sigmoid(r(preferred) - r(other)), the sum of this over experts, and the terms of the recipe.
    Raises InvalidTask for invalid pairs, UnknownName for an unknown task, TrainingError for settings out
    of range, for a task without pairs and for a loss that is not finite, CompositionError for a base without a head of one
    label and without a tokenizer.
    """
    settings = HeadTraining(steps, lr, batch_size, seed)
    _require_reward_model(model)
    by_expert = _pairs_by_expert(model, pairs)
    tokens = _tokens(model, by_expert)
    learning = [parameter for parameter in model.expert_parameters().values() if parameter.requires_grad]
    # experts with the same pairs take them in the same order
    orders = [Epochs(len(group), settings.seed) for group in by_expert]

    def next_loss() -> Tensor:
        chosen = [
            [group[index] for index in order.next(settings.batch_size)]
            for group, order in zip(by_expert, orders, strict=True)
        ]
        return _loss(model, chosen, tokens)

    was_training = model.training
    model.train()
    try:
        learn(learning, settings, next_loss, what="the reward experts", progress=progress)
    finally:
        model.train(was_training)
    return model


def _loss(model: ExpertModel, chosen: Sequence[Pairs], tokens: Mapping[str, list[int]]) -> Tensor:
    """Return the sum over experts of their pairs' mean loss, plus the recipe's terms, from one pass of the model."""
    rows = [tokens[pair[side]] for side in (0, 1) for group in chosen for pair in group]
    experts = [expert for expert, group in enumerate(chosen) for _ in group]
    preferred_N, other_N = _rewards(model, padded(model.tokenizer, rows, model.device), 2 * experts).chunk(2)
    by_pair_N = functional.softplus(other_N - preferred_N)
    loss = by_pair_N.view(len(chosen), -1).mean(dim=1).sum()
    return torch.stack([loss, *(term.to(loss) for term in model.terms.values())]).sum()


def _rewards(model: ExpertModel, inputs: Mapping[str, Any], experts: list[int]) -> Tensor:
    return own_reward(model(**without_cache(model.base_model, inputs), task=experts))


def _require_reward_model(model: ExpertModel) -> None:
    require_expert_model(model, "a reward ensemble")
    require_reward_head(model.base_model)


def _pairs_by_expert(model: ExpertModel, pairs: Pairs | Mapping[str, Pairs]) -> list[Pairs]:
    """Return the pairs of each expert, in the order of the model's tasks."""
    pairs_by_task = pairs if isinstance(pairs, Mapping) else dict.fromkeys(model.tasks, pairs)
    for task in pairs_by_task:
        if task not in model.tasks:
            known = ", ".join(map(repr, model.tasks))
            raise UnknownName(
                f"recipe {model.recipe.name!r} has no task {task!r}{nearest(task, model.tasks)}; it has {known}"
            )
    for task in model.tasks:
        if task not in pairs_by_task:
            raise TrainingError(
                f"task {task!r} has no pairs to learn from: give {{task: pairs}} for every task, or one list for all"
            )
        require_pairs(pairs_by_task[task])
    return [pairs_by_task[task] for task in model.tasks]


def _tokens(model: ExpertModel, by_expert: Sequence[Pairs]) -> dict[str, list[int]]:
    if model.tokenizer is None:
        raise CompositionError("texts need a tokenizer: make the expert model with tokenizer=...")
    texts = list(dict.fromkeys(text for pairs in by_expert for pair in pairs for text in pair))
    tokens = {text: list(ids) for text, ids in zip(texts, model.tokenizer(texts)["input_ids"], strict=True)}
    for text, ids in tokens.items():
        if not ids:
            raise InvalidTask(f"text {text!r} has no tokens")
    return tokens
