"""The pieces of gates: which experts they keep, what the weights are, and what training draws."""

import math

import torch
from torch.nn import functional

from loraweave.routers.recipes._gate import noisy
from loraweave.routers.tokens._scores import top_p_of_softmax


def scores_of(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_top_p_keeps_the_fewest_that_suffice():
    p_E = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05], dtype=torch.float64)
    for top_p, kept in (
        (0.4, {1}),
        (0.5, {1}),
        (0.6, {1, 3}),
        (0.85, {0, 1, 3}),
        (0.91, {0, 1, 2, 3}),
        (1.0, set(range(5))),
    ):
        w_E = top_p_of_softmax(p_E.log()[None, None], top_p)[0, 0]
        assert set(w_E.nonzero().flatten().tolist()) == kept
        torch.testing.assert_close(w_E[list(kept)], p_E[list(kept)])


def test_top_p_has_the_gradient_of_the_softmax_where_it_keeps():
    scores_BTE = scores_of(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores_BTE: top_p_of_softmax(scores_BTE, 0.7), (scores_BTE,))


def test_noise_has_the_standard_deviation_that_the_spread_says():
    torch.manual_seed(0)
    scores_BTE, spread_BTE = torch.tensor([1.0, -2.0]).expand(1, 40_000, 2), torch.tensor([0.0, 3.0]).expand(1, 40_000, 2)
    made_NE = noisy(scores_BTE, spread_BTE)[0]
    torch.testing.assert_close(made_NE.mean(dim=0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.06)
    torch.testing.assert_close(made_NE.std(dim=0), torch.tensor([math.log(2), math.log(1 + math.exp(3))]), rtol=0.02, atol=0)


def test_noise_teaches_its_spread():
    scores_BTE, spread_BTE = scores_of(1, 3, 4), scores_of(1, 3, 4, seed=1).requires_grad_()
    torch.manual_seed(0)
    made_BTE = noisy(scores_BTE, spread_BTE)
    (grad_BTE,) = torch.autograd.grad(made_BTE.sum(), spread_BTE)
    drawn_BTE = (made_BTE - scores_BTE) / functional.softplus(spread_BTE)
    torch.testing.assert_close(grad_BTE, drawn_BTE * spread_BTE.sigmoid())
