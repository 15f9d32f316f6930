"""The softmax of the highest scores by compiled code, beside the one by torch.topk."""

from __future__ import annotations

import shutil

import pytest
import torch
from rounding import unit
from torch.fx.experimental.proxy_tensor import make_fx

from loraweave.routers.tokens import _scores
from loraweave.routers.tokens._scores import MOST_COMPARED, top_k_native, top_k_softmax

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def by_torch(scores_BTE, top_k):
    best = scores_BTE.topk(top_k, dim=-1)
    return torch.zeros_like(scores_BTE).scatter_(-1, best.indices, best.values.softmax(dim=-1))


def scores(*shape, seed=0):
    return 5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (4, 3), (7, 2), (33, 7), (200, 1)])
def test_it_is_the_softmax_of_what_topk_finds(num_experts, top_k):
    scores_BTE = scores(3, 5, num_experts)
    scores_BTE[0, 0, 0], scores_BTE[1, 1, 1:] = -torch.inf, -torch.inf
    found_BTE = top_k_native(scores_BTE, top_k)
    wanted_BTE = by_torch(scores_BTE.double(), top_k)
    # a rounded difference of scores is below exp, which is off by a unit or two itself; then come the sum and the quotient
    below_BTE = (scores_BTE.amax(dim=-1, keepdim=True) - scores_BTE).where(wanted_BTE > 0, 0.0)
    off_BTE = unit(torch.float32) * (below_BTE + top_k + 4) * wanted_BTE
    assert bool(((found_BTE - wanted_BTE).abs() <= off_BTE).all())
    torch.testing.assert_close(found_BTE.sum(dim=-1), torch.ones(3, 5))


def test_of_equal_scores_the_first_are_chosen():
    assert top_k_native(torch.tensor([[[1.0, 3.0, 1.0, 1.0, 3.0]]]), 3).ne(0).tolist() == [
        [[True, True, False, False, True]]
    ]


@pytest.mark.parametrize(
    "row", [[1.0, float("nan"), 2.0, 3.0], [float("nan")] * 4, [-torch.inf] * 4, [1.0, torch.inf, 2.0, 3.0]]
)
def test_what_has_no_softmax_is_no_number_here_either(row):
    scores_11E = torch.tensor([[row]])
    assert bool(top_k_native(scores_11E, 2).isnan().any())
    assert bool(by_torch(scores_11E, 2).isnan().any())


def test_a_tokens_weights_have_the_same_bits_in_every_batch():
    scores_BTE = scores(64, 70, 8)
    whole_BTE = top_k_softmax(scores_BTE, 3)
    for row, token in ((0, 0), (13, 69), (63, 1)):
        assert torch.equal(
            top_k_softmax(scores_BTE[row : row + 1, token : token + 1], 3), whole_BTE[row : row + 1, token : token + 1]
        )
    # also of scores that do not lie one after the other
    assert torch.equal(top_k_softmax(scores_BTE.transpose(0, 1), 3), whole_BTE.transpose(0, 1))


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning",
    "ignore:`torch.jit.trace",  # a DeprecationWarning or a FutureWarning, by torch's version
    "ignore::torch.jit.TracerWarning",
)
def test_what_it_cannot_do_is_left_to_torch(monkeypatch):
    scores_BTE = scores(2, 3, 8)
    learned_BTE = scores_BTE.clone().requires_grad_()
    for left in (
        scores_BTE.double(),
        scores_BTE.bfloat16(),
        learned_BTE,
        scores_BTE.to("meta"),
        scores(1, 1, MOST_COMPARED),
    ):
        assert top_k_native(left, 2) is None
    assert top_k_softmax(learned_BTE, 2).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(top_k_softmax(learned_BTE, 2), by_torch(scores_BTE, 2))
    by_row = torch.vmap(lambda scores_TE: top_k_softmax(scores_TE, 2))(scores_BTE)
    torch.testing.assert_close(by_row, by_torch(scores_BTE, 2))
    traced = make_fx(lambda scores_BTE: top_k_softmax(scores_BTE, 2))(torch.zeros(2, 3, 8))
    torch.testing.assert_close(traced(scores_BTE), by_torch(scores_BTE, 2))
    jitted = torch.jit.trace(lambda scores_BTE: top_k_softmax(scores_BTE, 2), torch.zeros(2, 3, 8), check_trace=False)
    torch.testing.assert_close(jitted(scores_BTE), by_torch(scores_BTE, 2))
    compiled = torch.compile(lambda scores_BTE: top_k_softmax(scores_BTE, 2), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(scores_BTE), by_torch(scores_BTE, 2))
    monkeypatch.setattr(_scores, "_library", lambda: None)
    assert top_k_native(scores_BTE, 2) is None
