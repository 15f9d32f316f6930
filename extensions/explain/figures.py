"""The figures that an explanation's table, picture and page show, with the grouping, names and colours they share."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from torch import Tensor

from loraweave import CompositionError
from loraweave.extend import unknown_expert
from loraweave.extend.routing import block_of
from loraweave.extensions.explain.used import Load, load_of

# Okabe and Ito's colours, told apart with any kind of colour vision; numbers say the same
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00")
OTHER = "#999999"


@dataclass(frozen=True, eq=False)
class TokenFigures:
    """The weight of each expert for each token in each layer, `w_TLE`, fp32.

    NaN for tokens that a layer never sees (an encoder's text in the decoder); 0 for an expert that does not update the
    layer. `tokens` are pieces of text; a character that several tokens share is shown at each. `effects` says by how much
    the loss rises without an expert, in nats (leave_one_out()); experts for which that is unknown are left out. Raises
    CompositionError for names that do not fit the weights.
    """

    tokens: tuple[str, ...]
    layers: tuple[str, ...]
    experts: tuple[str, ...]
    w_TLE: Tensor
    effects: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named, shape = (len(self.tokens), len(self.layers), len(self.experts)), tuple(self.w_TLE.shape)
        if shape != named:
            raise CompositionError(f"the weights have shape {shape}, but the tokens, layers and experts named are {named}")

    def require_weights(self) -> None:
        """Raise CompositionError if there is no weight to show."""
        if not self.w_TLE.numel():
            raise CompositionError(
                f"nothing to show of {len(self.tokens)} tokens, {len(self.layers)} layers and {len(self.experts)} experts; "
                "the base has no expert"
            )

    def with_effects(self, effects: Mapping[str, float]) -> Self:
        """Return a copy with the effects of leave_one_out(). Raises UnknownExpert for a name that no expert has."""
        for name in effects:
            if name not in self.experts:
                raise unknown_expert(name, self.experts)
        return replace(self, effects=dict(effects))

    @cached_property
    def by_layer_LE(self) -> Tensor:
        """The mean weight over the tokens (L, E)."""
        return self.w_TLE.nanmean(dim=0)

    @cached_property
    def by_token_TE(self) -> Tensor:
        """The mean weight over the layers (T, E)."""
        return self.w_TLE.nanmean(dim=1)

    @cached_property
    def colours(self) -> dict[int, str]:
        """The mapping {expert's index: colour} of the experts that are strongest most often; the same in every picture."""
        return Strongest.of(self.w_TLE.flatten(0, 1)).colours

    @property
    def load(self) -> dict[str, Load]:
        """Each layer's `Load`, the experts' shares of the weight and their entropy, over the tokens that the layer sees."""
        seen_TL = ~self.w_TLE.isnan().any(dim=2)
        return {layer: load_of(self.w_TLE[seen_TL[:, at], at][None]) for at, layer in enumerate(self.layers)}

    @property
    def total(self) -> Load:
        """The `Load`, the experts' shares of the weight and their entropy, over all tokens and layers."""
        return load_of(self.w_TLE[~self.w_TLE.isnan().any(dim=2)][None])


@dataclass(frozen=True)
class Strongest:
    """The index of the expert with the largest |w| in each row of weights (None without weight), and its share of |w|."""

    experts: tuple[int | None, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, w_NE: Tensor) -> Self:
        """Return the strongest expert of each of N weight vectors; NaN counts as no weight."""
        magnitude_NE = w_NE.abs().nan_to_num()
        total_N = magnitude_NE.sum(dim=1)
        share_N = magnitude_NE.amax(dim=1) / total_N.clamp(min=1e-30)
        best_N = magnitude_NE.argmax(dim=1).tolist()
        experts = [best if total else None for best, total in zip(best_N, total_N.tolist(), strict=True)]
        return cls(tuple(experts), tuple(share_N.tolist()))

    @property
    def colours(self) -> dict[int, str]:
        """The mapping {expert's index: colour} of the experts that are most often strongest; all others have OTHER."""
        counted = Counter(expert for expert in self.experts if expert is not None)
        often = sorted(counted, key=lambda expert: (-counted[expert], expert))
        return dict(zip(often, PALETTE, strict=False))


def block_and_kind(layer: str) -> tuple[str, str]:
    """Return (path up to the first number, the rest) of a layer; the whole path twice for a layer outside blocks."""
    block = block_of(layer)
    return (layer, layer) if block is None else (block, layer[len(block) + 1 :])


def group_places(groups: Sequence[str]) -> dict[str, list[int]]:
    """Return {group: indices of its members}, in order of first appearance."""
    members: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    return members


def common_prefix(paths: Sequence[str]) -> str:
    """Return the parts that all paths begin with, with their last dot; never a whole path."""
    shortest = min((path.split(".")[:-1] for path in paths), key=len)
    count = 0
    while count < len(shortest) and len({tuple(path.split(".")[: count + 1]) for path in paths}) == 1:
        count += 1
    return "".join(f"{part}." for part in paths[0].split(".")[:count])


def last_parts(kinds: Sequence[str]) -> list[str]:
    """Return the last dotted part of each kind if these differ, else the kinds."""
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return last if len(set(last)) == len(kinds) else list(kinds)
