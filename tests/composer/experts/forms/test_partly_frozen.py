"""The sum of experts, some of which do not learn."""

import pytest
import torch

from loraweave.composer.experts.forms.partly_frozen import PartlyFrozen
from loraweave.composer.experts.forms.sum_of_experts import SumOfExperts
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.routers.recipes.pfedlora import Pfedlora

SITE = Site("layer", 5, 7)
SHAPE = ExpertShape((2, 3))


def random_starts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(rank, 5, generator=generator), torch.randn(rank, 7, generator=generator)) for rank in SHAPE.ranks]


@pytest.mark.parametrize("phase", ["local", "shared"])
def test_it_is_the_sum_of_experts(phase):
    frozen, learned = PartlyFrozen(Pfedlora(phase=phase), SITE, SHAPE), SumOfExperts(Recipe(), SITE, SHAPE)
    for layer in (frozen, learned):
        layer.reset(random_starts())
    module, x_BTI = torch.nn.Linear(5, 7), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    w_BTE = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        made, expected = (layer(module, (x_BTI,), module(x_BTI), lambda _: w_BTE) for layer in (frozen, learned))
    torch.testing.assert_close(made, expected)
    for number in (0, 1):
        w_E = torch.eye(2)[number]
        torch.testing.assert_close(frozen.factors(w_E).a_RI, learned.factors(w_E).a_RI)
        torch.testing.assert_close(frozen.factors(w_E).b_OR, learned.factors(w_E).b_OR)


@pytest.mark.parametrize(("phase", "own_rank"), [("local", 3), ("shared", 2)])
def test_what_learns_has_the_gradient_that_it_has_beside_others_that_learn(phase, own_rank):
    frozen, learned = PartlyFrozen(Pfedlora(phase=phase), SITE, SHAPE), SumOfExperts(Recipe(), SITE, SHAPE)
    module, x_BTI = torch.nn.Linear(5, 7), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    for layer in (frozen, learned):
        layer.reset(random_starts())
        layer(module, (x_BTI,), module(x_BTI).detach(), lambda _: torch.ones(1, 1, 2)).square().sum().backward()
    assert {name for name, _ in frozen.named_parameters()} == {"a_SI", "b_SO"}
    rows = slice(2, 5) if own_rank == 3 else slice(0, 2)
    torch.testing.assert_close(frozen.a_SI.grad, learned.a_SI.grad[rows])
    torch.testing.assert_close(frozen.b_SO.grad, learned.b_SO.grad[rows])


@pytest.mark.parametrize("phase", ["local", "shared"])
def test_what_was_put_in_is_given_back(phase):
    layer = PartlyFrozen(Pfedlora(phase=phase), SITE, SHAPE)
    layer.reset(random_starts())
    for (a_RI, b_RO), (given_a_RI, given_b_RO) in zip(layer.starts(), random_starts(), strict=True):
        assert torch.equal(a_RI, given_a_RI)
        assert torch.equal(b_RO, given_b_RO)
