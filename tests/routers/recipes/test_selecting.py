"""The pieces of gates: which experts they keep, what the weights are, and what training draws."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from loraweave.routers.recipes._token_gates import even_share, noisy, top_k_of_softmax, within_capacity
from loraweave.routers.tokens._scores import top_p_of_softmax


def scores_of(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_best_k_keep_their_softmax_over_all(top_k):
    scores_BTE = scores_of(2, 3, 5)
    w_BTE = top_k_of_softmax(scores_BTE, top_k)
    for scores_E, w_E in zip(scores_BTE.flatten(0, 1), w_BTE.flatten(0, 1), strict=True):
        total = sum(math.exp(score) for score in scores_E.tolist())
        best = sorted(range(5), key=lambda expert: -float(scores_E[expert]))[:top_k]
        expected = [math.exp(score) / total if expert in best else 0.0 for expert, score in enumerate(scores_E.tolist())]
        assert w_E.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_one_best_has_a_gradient_to_all_scores_that_of_a_softmax():
    scores_BTE = scores_of(1, 1, 4).requires_grad_()
    (grad_BTE,) = torch.autograd.grad(top_k_of_softmax(scores_BTE, 1).sum(), scores_BTE)
    p_E = scores_BTE.detach().softmax(dim=-1)[0, 0]
    best = int(p_E.argmax())
    expected_E = -p_E[best] * p_E
    expected_E[best] += p_E[best]
    torch.testing.assert_close(grad_BTE[0, 0], expected_E)


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


def test_what_overflows_is_zero_and_what_does_not_is_as_it_was():
    w_BTE = torch.tensor([[[0.6, 0.0], [0.7, 0.3], [0.0, 0.4], [0.2, 0.9], [0.5, 0.0]]])
    made_BTE = within_capacity(w_BTE, torch.tensor([2]))
    assert torch.equal(made_BTE[0], torch.tensor([[0.6, 0], [0.7, 0.3], [0, 0.4], [0, 0], [0, 0]]))


def test_padding_takes_no_capacity():
    w_BTE, real_BT = torch.ones(1, 4, 1), torch.tensor([[False, True, False, True]])
    assert within_capacity(w_BTE, torch.tensor([1]), real_BT)[real_BT].flatten().tolist() == [1, 0]


def test_a_row_overflows_by_itself():
    together_BTE = torch.ones(2, 3, 2)
    made_BTE = within_capacity(together_BTE, torch.tensor([1, 3]))
    assert torch.equal(made_BTE[1], together_BTE[1])
    assert made_BTE[0].sum(dim=0).tolist() == [1, 1]


def test_capacity_of_the_length_is_no_limit():
    w_BTE = top_k_of_softmax(scores_of(2, 7, 3), 2)
    assert torch.equal(within_capacity(w_BTE, torch.tensor([7, 7])), w_BTE)


def test_one_best_expert_within_capacity_is_what_the_router_of_switch_transformers_makes():
    config = SwitchTransformersConfig(hidden_size=5, num_experts=3, expert_capacity=2, router_jitter_noise=0.0)
    router, x_BTI = SwitchTransformersTop1Router(config).eval(), torch.randn(2, 9, 5)
    chosen_BTE, probability_BT1, scores_BTE = router(x_BTI)
    own_BTE = within_capacity(top_k_of_softmax(scores_BTE, 1), torch.tensor([2, 2]))
    torch.testing.assert_close(own_BTE, chosen_BTE * probability_BT1)


def test_the_even_share_counts_real_tokens_and_is_rounded_up():
    real_BT = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    assert even_share(real_BT, 4, 2, 1.0).tolist() == [3, 2]
    assert even_share(real_BT, 4, 2, 1.25).tolist() == [4, 2]
