"""A router as simple as one can be, and data for it."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._members import LayerTensors
from loraweave.routers.tokens._scores import without


class Gates(LearnedRouter):
    """w = softmax(g x) with a matrix g_EI for each layer, which starts at zero."""

    lr: ClassVar[float] = 0.05

    def __init__(self, pool, *, dropout=0.0):
        super().__init__(pool)
        self.dropout = dropout
        sizes = {layer: torch.zeros(len(self.experts), self.members.layers[layer].num_inputs) for layer in self.layers}
        self.gates_ = LayerTensors(sizes, learned=True)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        x_BTI = torch.nn.functional.dropout(x_BTI.float(), self.dropout, self.training)
        scores_BTE = without(x_BTI @ self.gates_[layer].T, self.members.layers[layer].experts)
        return self.note(layer, scores_BTE, scores_BTE.softmax(dim=-1))


class Apart(Gates):
    """w = sigmoid(g_e x) for the expert e that a row belongs to, 0 for the others; when used, for all of them."""

    apart: ClassVar[bool] = True
    needs_experts: ClassVar[bool] = True
    simplex: bool = False

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        scores_BTE = x_BTI.float() @ self.gates_[layer].T
        w_BTE = scores_BTE.sigmoid()
        if self.step is not None:
            own_BE = torch.nn.functional.one_hot(self.step.expert_B, len(self.experts))
            w_BTE = w_BTE * own_BE[:, None]
        return self.note(layer, scores_BTE, w_BTE)


DATA = {
    "a": [("abc", "cba"), ("ba", "ab"), ("dog", "god"), ("tip", "pit")],
    "b": [("one", "1"), ("two", "2"), ("three", "3")],
    "c": [("cat", "cats"), ("apple", "apples"), ("bird", "birds")],
}


@pytest.fixture(scope="session")
def data():
    return DATA


@pytest.fixture(scope="session")
def gates():
    return Gates


@pytest.fixture(scope="session")
def apart():
    return Apart
