"""Layers by their paths: which block a layer lies in, which kind it is of, and what all paths have in common."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.routers.routing.blocks import block_of


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
