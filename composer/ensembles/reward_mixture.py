"""One reward from the features of several mixtures: the inner mixture of DMoERM (Quan, 2024, arXiv 2403.01197).

The last hidden states of T members beside each other go through Linear(T h -> h), PReLU and Linear(h -> 1).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.features import features
from loraweave.composer.ensembles.member_passes import known_members
from loraweave.composer.ensembles.preferences import Pairs, Settings, fit, pair_features, seeded
from loraweave.errors import AdapterCorrupt, AdapterNotFound, CompositionError, WeightingError
from loraweave.hub.formats._saved_tensors import save_tensors
from loraweave.hub.stores.storage_errors import storage_errors

FORMAT = 1
FILE = "reward_mixture.safetensors"

Member = Mapping[str, float] | None


class RewardMixture(nn.Module):
    """features_MBH of the members -> reward_B, in their order: column block m of `inner.weight` belongs to member m.

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
        """reward_B of each row of a batch, as the model takes it, padded on either side.

        Raises UnknownExpert for a member that the engine's pool has not, CompositionError for another adapter of its name.
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

    def reordered(self, order: Sequence[int]) -> RewardMixture:
        """The same function of the members in another order: member i of it is member order[i] of this one."""
        if sorted(order) != list(range(len(self.members))):
            raise WeightingError(f"{list(order)} is no order of {len(self.members)} members")
        other = RewardMixture([self.members[index] for index in order], self.hidden_size, hashes=self.hashes)
        state = {key: value.clone() for key, value in self.state_dict().items()}
        blocks = state["inner.weight"].unflatten(1, (len(self.members), self.hidden_size))
        state["inner.weight"] = blocks[:, list(order)].flatten(1)
        other.to(self.outer.weight).load_state_dict(state)
        return other

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the head with its members' names, weights and hashes; the adapters stay where they are."""
        target = Path(folder) / FILE
        recipe = {
            "format": FORMAT,
            "members": [None if member is None else dict(member) for member in self.members],
            "hidden_size": self.hidden_size,
            "hashes": self.hashes,
        }
        temporary = target.with_name(f".{uuid.uuid4().hex}.unfinished")
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        with storage_errors(target, "saving a reward mixture"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_tensors(tensors, temporary, metadata={"loraweave": json.dumps(recipe)})
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return target.parent

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RewardMixture:
        """Reads what save_pretrained wrote; AdapterNotFound without it, AdapterCorrupt for a file that is damaged."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise AdapterNotFound(f"{folder} holds no {FILE}; save_pretrained() of a reward mixture writes it")
        try:
            with safe_open(path, framework="pt") as file:
                recipe = json.loads((file.metadata() or {})["loraweave"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if recipe["format"] != FORMAT:
                raise CompositionError(f"{path} has format {recipe['format']}, but this version reads {FORMAT}")
            found = cls(recipe["members"], recipe["hidden_size"], hashes=recipe["hashes"])
            found.to(tensors["outer.weight"]).load_state_dict(tensors)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise AdapterCorrupt(f"{path} is damaged ({type(error).__name__}: {error})") from error
        return found


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
    """A RewardMixture of the members, trained on pairs (preferred text, other text) with model and adapters frozen.

    Every text is run once under each member; then `steps` steps of AdamW without weight decay on the pairwise logistic loss
    -log sigmoid(r(preferred) - r(other)), over `batch_size` pairs in shuffled epochs. Members are mappings, None, or
    MixtureWeights of task scope that all layers share, so that they can be written down.
    Raises WeightingError for other members, InvalidTask for pairs that are none, TrainingError for settings out of range and
    for a loss that is not finite.
    """
    settings = Settings(steps, lr, batch_size, seed)
    members = known_members(engine, mixtures)
    for number, member in enumerate(members):
        if not (member is None or isinstance(member, Mapping)):
            raise WeightingError(
                f"member {number} is a {type(member).__name__}; a reward mixture keeps {{name: weight}} or None"
            )
    names = {name for member in members if member for name in member}
    hashes = {name: engine.pool.adapters[name].hash for name in sorted(names)}
    preferred_MNH, other_MNH = pair_features(engine, members, pairs, progress=progress)
    head = seeded(seed, lambda: RewardMixture(members, preferred_MNH.shape[2], hashes=hashes)).to(preferred_MNH)
    fit(head, preferred_MNH, other_MNH, settings, progress=progress)
    return head
