"""A router for each row: every one sees its own rows, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraweave.errors import ScopeError, WeightingError
from loraweave.routers.combined import ByRow
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
