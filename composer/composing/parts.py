"""The examples that weights are chosen on, and those that are held out meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """Indices of the examples that a choice sees, and of those it is measured on afterwards."""

    name: str
    seen: tuple[int, ...]
    held: tuple[int, ...] = ()


def whole(num_examples: int) -> Part:
    """All examples, and none held out."""
    return Part("all", tuple(range(num_examples)))


def folds(num_examples: int, count: int, seed: int) -> list[Part]:
    """At most `count` parts whose held-out examples cover all, in a shuffled order that depends on the seed alone."""
    count = min(count, num_examples)
    order = np.random.default_rng(seed).permutation(num_examples).tolist()
    held_out = [tuple(sorted(order[start::count])) for start in range(count)]
    return [
        Part(f"fold-{number}", tuple(index for index in range(num_examples) if index not in held), held)
        for number, held in enumerate(held_out)
    ]
