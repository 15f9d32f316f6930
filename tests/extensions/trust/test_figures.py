"""An adapter in numbers: equal to those of its dense updates, however they are factored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.extensions.trust.figures import CODE_BITS, figures_of, hamming
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

SHAPES = {"a": (7, 5, 3), "b": (9, 4, 2), "c": (5, 6, 3), "d": (3, 3, 1)}


def matrix(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(matrix(generator, rank, inputs), matrix(generator, outputs, rank))
        for name, (outputs, inputs, rank) in SHAPES.items()
    }


def wide(seed, noise=0.0):
    """Two layers that are longer than the random matrices, with noise of another seed on B."""
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    found = {}
    for name in ("p", "q"):
        a_RI, b_OR = (torch.randn(*shape, generator=generator) for shape in ((4, 9001), (300, 4)))
        found[name] = Factors(a_RI, b_OR + noise * torch.randn(b_OR.shape, generator=other))
    return Adapter("x", "base", found)


def figures(layers, base="base"):
    return figures_of(Adapter("x", base, layers), base)


def test_norms_and_shares_are_those_of_the_dense_updates():
    found = figures(layers())
    for position, name in enumerate(found.layers):
        factors = layers()[name]
        values = np.linalg.svd((factors.b_OR @ factors.a_RI).numpy(), compute_uv=False)
        share = min(values[0] ** 2 / (values**2).sum(), 1 - 1e-6)
        assert found.log_norm_L[position] == pytest.approx(0.5 * np.log((values**2).sum()), abs=1e-5)
        assert 1 / (1 + np.exp(-found.dominance_L[position])) == pytest.approx(share, abs=1e-5)


def test_a_factor_whose_columns_depend_on_each_other_has_the_figures_of_its_product():
    # neither of the ranks that it has too many nor an update of zero beside it has a Cholesky factor
    whole = layers()
    for name, factors in whole.items():
        twice = Factors(torch.cat([factors.a_RI] * 2), torch.cat([0.25 * factors.b_OR, 0.75 * factors.b_OR], dim=1))
        found = figures({name: twice, "zero": Factors(0 * twice.a_RI, 0 * twice.b_OR)})
        values = np.linalg.svd((factors.b_OR @ factors.a_RI).numpy(), compute_uv=False)
        place = found.layers.index(name)
        share = min(values[0] ** 2 / (values**2).sum(), 1 - 1e-6)
        assert found.log_norm_L[place] == pytest.approx(0.5 * np.log((values**2).sum()), abs=1e-5)
        assert 1 / (1 + np.exp(-found.dominance_L[place])) == pytest.approx(share, abs=1e-5)


def test_another_factoring_of_the_same_update_has_the_same_figures():
    generator = torch.Generator().manual_seed(9)
    moved = {}
    for name, factors in layers().items():
        turn_RR = matrix(generator, factors.rank, factors.rank)
        moved[name] = Factors(turn_RR @ factors.a_RI, factors.b_OR @ torch.linalg.inv(turn_RR))
    own, other = figures(layers()), figures(moved)
    np.testing.assert_allclose(other.log_norm_L, own.log_norm_L, atol=1e-4)
    np.testing.assert_allclose(other.dominance_L, own.dominance_L, atol=1e-3)
    assert hamming(own.code, other.code) <= 1


def test_the_order_of_layers_does_not_matter():
    turned = dict(reversed(layers().items()))
    own, other = figures(layers()), figures(turned)
    assert (own.kin, own.code, own.layers) == (other.kin, other.code, other.layers)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_a_factor_moves_the_norm_alone_however_large(factor):
    scaled = {name: Factors(factors.a_RI * factor, factors.b_OR) for name, factors in layers().items()}
    own, other = figures(layers()), figures(scaled)
    np.testing.assert_allclose(other.log_norm_L - own.log_norm_L, np.log(factor), rtol=1e-5)
    np.testing.assert_allclose(other.dominance_L, own.dominance_L, atol=1e-3)
    assert hamming(own.code, other.code) <= 1


def test_a_layer_without_an_update_has_no_figures_of_its_own():
    dead = {
        **layers(),
        "b": Factors(torch.zeros(2, 4), torch.ones(9, 2)),
        "e": Factors(torch.zeros(0, 4), torch.zeros(9, 0)),
    }
    found = figures(dead)
    assert np.isnan(found.log_norm_L).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(("noise", "low", "high"), [(0.02, 0, 3), (0.2, 3, 14), (1.0, 22, 44), (30.0, 44, 84)])
def test_codes_differ_in_the_share_of_bits_that_the_angle_is_of_half_a_turn(noise, low, high):
    # angle / pi * 128 bits for cosines of 0.9998, 0.98, 0.71 and 0.03, and three standard deviations
    assert len(figures_of(wide(0), "base").code) * 8 == CODE_BITS
    for seed in range(3):
        distance = hamming(figures_of(wide(seed), "base").code, figures_of(wide(seed, noise), "base").code)
        assert low <= distance <= high


def test_only_adapters_of_one_base_with_the_same_layers_and_sizes_are_kin():
    own = figures(layers()).kin
    assert figures(layers(1)).kin == own
    assert figures(layers(), base="other").kin != own
    assert figures({name: factors for name, factors in layers().items() if name != "a"}).kin != own
    assert figures({**layers(), "a": Factors(torch.ones(1, 5), torch.ones(8, 1))}).kin != own
