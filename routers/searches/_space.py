"""The space of a search's vectors, and the conversion between vectors and mixture weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from loraweave.common.names import unknown_expert
from loraweave.errors import WeightingError
from loraweave.routers.weights import MixtureWeights


@dataclass(frozen=True)
class Space:
    """A box [low, high] with one dimension for each expert, or for each expert in each group of layers.

    `groups` maps a group's name to its layers, which no other group has; layers in no group get no weight. A vector has the
    weights of the first group's experts first. Raises WeightingError for a box, experts or groups that cannot be used.
    """

    experts: tuple[str, ...]
    low: float = -1.5
    high: float = 1.5
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.experts:
            raise WeightingError("a search needs at least one expert")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            way_out = "; swap them" if self.low > self.high else ""
            raise WeightingError(f"weights lie in [low, high], but low is {self.low!r} and high is {self.high!r}{way_out}")
        if empty := [name for name, layers in self.groups.items() if not layers]:
            raise WeightingError(f"group {empty[0]!r} has no layers")
        if len(set(self.layers)) < len(self.layers):
            twice = next(layer for layer in self.layers if self.layers.count(layer) > 1)
            raise WeightingError(f"layer {twice!r} is in two places of the groups; a layer has one weight for each expert")

    @property
    def size(self) -> int:
        """The number of weights in a vector."""
        return max(len(self.groups), 1) * len(self.experts)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers of all groups, group by group."""
        return tuple(chain.from_iterable(self.groups.values()))

    @cached_property
    def group_L(self) -> np.ndarray:
        """The index of each layer's group (L,)."""
        counts = list(map(len, self.groups.values()))
        return np.repeat(np.arange(len(counts)), counts)

    def mixture(self, vector: np.ndarray) -> MixtureWeights:
        """Return the task-scope weights of a vector, in fp32, by layer where there are groups."""
        values_GE = torch.tensor(np.asarray(vector), dtype=torch.float32).view(-1, len(self.experts))
        values_LE = values_GE[torch.from_numpy(self.group_L)] if self.groups else values_GE
        return MixtureWeights(values_LE[None, None], self.experts, self.layers)

    def vector(self, weights: Mapping[str, float] | MixtureWeights | None) -> np.ndarray:
        """Return the vector of a mixture, with 0 for experts it does not name; the vector of zeros for None.

        For a mixture by layer, a group gets the mean over its layers. Raises WeightingError for names that are not experts,
        weights outside the box, and mixtures of another scope than task.
        """
        if isinstance(weights, MixtureWeights):
            vector = self._from_mixture(weights)
        else:
            for name in weights or {}:
                if name not in self.experts:
                    raise unknown_expert(name, dict.fromkeys(self.experts))
            row_E = [float((weights or {}).get(name, 0.0)) for name in self.experts]
            vector = np.tile(np.array(row_E), max(len(self.groups), 1))
        outside = ~((vector >= self.low) & (vector <= self.high))
        if outside.any():
            place = int(np.argmax(outside))
            raise WeightingError(
                f"start gives {self.experts[place % len(self.experts)]!r} the weight {vector[place]}, outside "
                f"[{self.low}, {self.high}]; start inside the box, or widen it with low= and high="
            )
        return vector

    def pull(self, gradient_BTLE: Tensor) -> np.ndarray:
        """Return d loss / d vector from d loss / d values_BTLE of its mixture: the sum over the layers of each group."""
        gradient_LE = gradient_BTLE.detach().double().cpu()[0, 0]
        if not self.groups:
            return gradient_LE.sum(dim=0).numpy()
        sums_GE = torch.zeros(len(self.groups), len(self.experts), dtype=torch.float64)
        return sums_GE.index_add_(0, torch.from_numpy(self.group_L), gradient_LE).flatten().numpy()

    def _from_mixture(self, weights: MixtureWeights) -> np.ndarray:
        if weights.scope != "task":
            raise WeightingError(f"a search starts at weights of task scope, but these are of {weights.scope} scope")
        if weights.experts != self.experts:
            raise WeightingError(f"the mixture has experts {weights.experts}, but the search has {self.experts}")
        layers: Sequence[str] = self.layers or weights.layers or ("",)
        values_LE = torch.stack([weights.for_layer(layer)[0, 0] for layer in layers]).double().numpy()
        if not self.groups:
            return np.asarray(values_LE.mean(axis=0))
        return np.concatenate([values_LE[self.group_L == number].mean(axis=0) for number in range(len(self.groups))])


def layer_groups(
    groups: Mapping[str, Sequence[str]] | None, layers: Sequence[str] | None, *, by_layer: bool
) -> Mapping[str, Sequence[str]] | None:
    """Return `groups` if given, else with `by_layer` one group for each of `layers`; None if all layers share weights.

    Raises WeightingError for a layer named twice.
    """
    if groups is not None or layers is None or not by_layer:
        return groups
    if len(set(layers)) < len(layers):
        twice = next(layer for layer in layers if list(layers).count(layer) > 1)
        raise WeightingError(f"layers names {twice!r} twice; a layer has one weight for each expert")
    return {layer: (layer,) for layer in layers}
