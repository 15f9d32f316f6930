"""A router for each row: every one sees its own rows, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraweave.errors import ScopeError, WeightingError
from loraweave.routers.combined import ByRow, begin, derive, masked, needs_call
from loraweave.routers.weights import MixtureWeights

EXPERTS = ("a", "b")
KNOWN = MixtureWeights.of({"a": 0.5, "b": -1.0}, EXPERTS)


class First:
    """Weights that tell which input was seen: the first feature for "a", twice that for "b"."""

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return torch.stack([x_BTI[..., 0], 2 * x_BTI[..., 0]], dim=-1)


def test_each_router_gives_the_weights_of_its_own_rows() -> None:
    x_BTI = torch.arange(24.0).view(6, 2, 2)
    w_BTE = ByRow([KNOWN, None, First()], EXPERTS).weights(x_BTI, "layer")
    assert w_BTE.shape == (6, 2, 2)
    assert w_BTE[:2].tolist() == [[[0.5, -1.0]] * 2] * 2
    assert w_BTE[2:4].tolist() == [[[0.0, 0.0]] * 2] * 2
    assert w_BTE[4:].tolist() == [[[16.0, 32.0], [18.0, 36.0]], [[20.0, 40.0], [22.0, 44.0]]]


def test_rows_that_all_tokens_share_stay_so() -> None:
    assert ByRow([KNOWN, None], EXPERTS).weights(torch.ones(2, 5, 3), "layer").shape == (2, 1, 2)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ScopeError, match=r"2 rows.*'layer' has 3"):
        ByRow([KNOWN, None], EXPERTS).weights(torch.ones(3, 1, 2), "layer")
    with pytest.raises(WeightingError, match=r"First of row 1 gave weights \(1, 4, 2\).*3 experts"):
        ByRow([None, First()], ("a", "b", "c")).weights(torch.ones(2, 4, 2), "layer")


class Longest:
    """Shown a call, it gives each row the share of its real tokens in all those of the batch."""

    def begin(self, model: object, arguments: dict[str, Tensor]) -> MixtureWeights:
        lengths_B = arguments["attention_mask"].sum(dim=1)
        share_B = lengths_B / lengths_B.sum()
        return MixtureWeights(torch.stack([share_B, -share_B], dim=1)[:, None, None], EXPERTS)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        raise AssertionError("the router of the call is asked")


CALL = {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}


def test_a_router_without_begin_is_its_own_in_every_call() -> None:
    plain = First()
    assert not needs_call(plain)
    assert begin(plain, None, CALL) is plain
    assert not needs_call(masked(plain, 0))
    assert not needs_call(ByRow([plain, KNOWN], EXPERTS))


def test_what_is_made_of_a_router_is_shown_the_calls_that_it_is_shown() -> None:
    twice = derive(masked(Longest(), 1), lambda own, x_BTI, layer: 2 * own.weights(x_BTI, layer))
    assert needs_call(twice)
    assert begin(twice, None, CALL).weights(torch.ones(2, 3, 4), "layer").tolist() == [[[1.5, 0.0]], [[0.5, 0.0]]]


def test_a_row_has_its_own_part_of_what_a_router_gives_to_the_batch() -> None:
    by_row = ByRow([None, Longest()], EXPERTS)
    assert needs_call(by_row)
    w_BTE = begin(by_row, None, CALL).weights(torch.ones(2, 3, 4), "layer")
    assert w_BTE.tolist() == [[[0.0, 0.0]], [[0.25, -0.25]]]
