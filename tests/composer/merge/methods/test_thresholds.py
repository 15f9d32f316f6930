"""Which entries are the largest, against a sort that is stable."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from loraweave.composer.merge.methods._pruning import Cut, largest

SHAPE = (7, 5)


def blocks_of(x_OI: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(x_OI), rows):
        yield slice(start, start + rows), x_OI[start : start + rows].abs()


def kept(cut: Cut, x_OI: Tensor, rows: int) -> Tensor:
    found = torch.full_like(x_OI, torch.nan)
    for start in range(0, len(x_OI), rows):
        part = slice(start, min(start + rows, len(x_OI)))
        cut.apply(part, x_OI[part], found[part])
    return found


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("values", [1, 2, 4, 1000])
@pytest.mark.parametrize("count", [-1, 0, 1, 2, 17, 34, 35, 36])
def test_exactly_so_many_of_the_largest_are_kept_of_equal_ones_the_earlier(count: int, values: int, rows: int) -> None:
    draw = np.random.default_rng(values)
    # of few values many are equal, and some are zeros
    x_OI = torch.from_numpy(draw.integers(-values, values + 1, SHAPE)).float()
    order = np.argsort(-x_OI.abs().numpy().ravel(), kind="stable")[: max(count, 0)]
    expected = torch.zeros(SHAPE)
    expected.view(-1)[order] = x_OI.view(-1)[order]
    cut = largest(lambda: blocks_of(x_OI, rows), count, torch.empty(SHAPE))
    for width in (1, 3, 7):
        assert torch.equal(kept(cut, x_OI, width), expected)
