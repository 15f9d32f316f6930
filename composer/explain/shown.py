"""Each token's strongest expert, and colours for the experts that are strongest most often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from loraweave.routers.tokens._model import block_of

# Okabe and Ito's colours, told apart with any kind of colour vision; numbers say the same
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00")
OTHER = "#999999"


@dataclass(frozen=True)
class Strongest:
    """For each row of weights the place of the expert with the largest |w| (None without weight), and its share of |w|."""

    experts: tuple[int | None, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, w_NE: Tensor) -> Self:
        """NaN counts as no weight."""
        magnitude_NE = w_NE.abs().nan_to_num()
        total_N = magnitude_NE.sum(dim=1)
        share_N = magnitude_NE.amax(dim=1) / total_N.clamp(min=1e-30)
        best_N = magnitude_NE.argmax(dim=1).tolist()
        experts = [best if total else None for best, total in zip(best_N, total_N.tolist(), strict=True)]
        return cls(tuple(experts), tuple(share_N.tolist()))

    @property
    def colours(self) -> dict[int, str]:
        """A colour for each of the experts that are strongest most often; the others are OTHER."""
        counted = Counter(expert for expert in self.experts if expert is not None)
        often = sorted(counted, key=lambda expert: (-counted[expert], expert))
        return dict(zip(often, PALETTE, strict=False))


def block_and_kind(layer: str) -> tuple[str, str]:
    """(the path up to its first number, what follows) of a layer; a layer outside blocks is its own block and kind."""
    block = block_of(layer)
    return (layer, layer) if block is None else (block, layer[len(block) + 1 :])


def places(groups: Sequence[str]) -> dict[str, list[int]]:
    """The places of each group's members, the groups in order of their first appearance."""
    found: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(group, []).append(place)
    return found


def common_prefix(paths: Sequence[str]) -> str:
    """The parts that all paths begin with, with their last dot; never a whole path."""
    shortest = min((path.split(".")[:-1] for path in paths), key=len)
    count = 0
    while count < len(shortest) and len({tuple(path.split(".")[: count + 1]) for path in paths}) == 1:
        count += 1
    return "".join(f"{part}." for part in paths[0].split(".")[:count])


def last_parts(kinds: Sequence[str]) -> list[str]:
    """The last part of each, where that still tells them apart."""
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return last if len(set(last)) == len(kinds) else list(kinds)
