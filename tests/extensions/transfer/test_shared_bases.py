"""Bases that updates share, against the paper's alternation written out with dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.extensions.transfer import shared_bases as joint
from loraweave.types import Factors


def updates(count: int, rank: int, num_out: int = 13, num_in: int = 11, seed: int = 0) -> list[Factors]:
    draw = torch.Generator().manual_seed(seed)
    return [random_factors(draw, rank, num_out, num_in) for _ in range(count)]


def restored(factors: Factors, basis: joint.Basis, middle: joint.Middle) -> np.ndarray:
    own = joint.as_matrix(joint.project(factors, basis, middle))
    return (basis.u_OR.double() @ own.double() @ basis.v_RI.double()).numpy()


def lost(given: list[Factors], basis: joint.Basis, middle: joint.Middle) -> float:
    """The sum that is minimised: of |D / |D| - U M V|^2."""
    pairs = [(dense(each), restored(each, basis, middle)) for each in given]
    return float(sum(np.linalg.norm(own - found) ** 2 / np.linalg.norm(own) ** 2 for own, found in pairs))


def by_definition(given: list[Factors], rank: int) -> float:
    """The same sum after 100 rounds of eigenvectors of dense matrices."""
    deltas = [dense(each) / np.linalg.norm(dense(each)) for each in given]
    v = np.linalg.eigh(sum(d.T @ d for d in deltas))[1][:, -rank:]
    for _ in range(100):
        u = np.linalg.eigh(sum(d @ v @ v.T @ d.T for d in deltas))[1][:, -rank:]
        v = np.linalg.eigh(sum(d.T @ u @ u.T @ d for d in deltas))[1][:, -rank:]
    return float(sum(np.linalg.norm(d - u @ u.T @ d @ v @ v.T) ** 2 for d in deltas))


@pytest.mark.parametrize(("count", "rank"), [(7, 4), (20, 6)])
def test_full_bases_lose_what_the_papers_alternation_loses(count: int, rank: int) -> None:
    given = updates(count, 2)
    basis = joint.fit(given, rank)
    assert lost(given, basis, "full") <= 1.02 * by_definition(given, rank)
    assert torch.allclose(basis.u_OR.T @ basis.u_OR, torch.eye(rank), atol=1e-5)
    assert torch.allclose(basis.v_RI @ basis.v_RI.T, torch.eye(rank), atol=1e-5)


def test_one_update_is_cut_as_its_singular_values_say() -> None:
    (one,) = updates(1, 5)
    values = np.linalg.svd(dense(one))[1]
    basis = joint.fit([one], 3)
    expected = np.sqrt((values[3:] ** 2).sum())
    assert np.linalg.norm(dense(one) - restored(one, basis, "full")) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("middle", ["full", "diagonal"])
def test_updates_that_share_bases_are_exact(middle: joint.Middle) -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(13, 3, generator=generator), torch.randn(3, 11, generator=generator)
    middles = [torch.randn(3, 3, generator=generator) for _ in range(9)]
    if middle == "diagonal":
        middles = [torch.diag(each.diagonal()) for each in middles]
    given = [Factors(each @ v, u) for each in middles]
    basis = joint.fit(given, 3, middle)
    for each in given:
        # another split of the same product has the same bases and the same middle
        twice = Factors(each.a_RI * 2, each.b_OR / 2)
        own = joint.project(twice, basis, middle)
        assert own.ndim == (2 if middle == "full" else 1)
        assert np.linalg.norm(dense(each) - restored(twice, basis, middle)) <= 2e-2 * np.linalg.norm(dense(each))


def test_a_diagonal_is_the_nearest_in_its_bases() -> None:
    given = updates(12, 2)
    basis = joint.fit(given, 8, "diagonal")
    columns = np.stack(
        [np.outer(u, v).ravel() for u, v in zip(basis.u_OR.T.numpy(), basis.v_RI.numpy(), strict=True)], axis=1
    )
    for each in given:
        expected = np.linalg.lstsq(columns.astype(float), dense(each).ravel(), rcond=None)[0]
        assert np.allclose(joint.project(each, basis, "diagonal").numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("middle", ["full", "diagonal"])
def test_the_error_is_that_of_the_dense_difference(middle: joint.Middle) -> None:
    given = [*updates(5, 2), *updates(1, 3, seed=9)]
    basis = joint.fit(given, 4, middle)
    for each in given:
        own = joint.project(each, basis, middle)
        expected = np.linalg.norm(dense(each) - restored(each, basis, middle)) ** 2
        assert joint.squared_error(each, basis, own) == pytest.approx(expected, rel=1e-4)


def test_a_rank_above_what_there_is_is_cut_and_exact() -> None:
    given = updates(2, 2)
    basis = joint.fit(given, 50)
    assert basis.u_OR.shape == (13, 4)
    assert lost(given, basis, "full") <= 1e-8
    for each in given:
        # four products that each round to fp32, in parts of the square of the norm
        error = joint.squared_error(each, basis, joint.project(each, basis))
        assert 0.0 <= error <= 1e-6 * np.linalg.norm(dense(each)) ** 2


def test_a_seed_has_one_result_and_nothing_is_lost_of_nothing() -> None:
    given = [*updates(3, 2), Factors(torch.zeros(2, 11), torch.zeros(13, 2))]
    first, second = joint.fit(given, 3, seed=4), joint.fit(given, 3, seed=4)
    assert torch.equal(first.u_OR, second.u_OR)
    assert bool(joint.project(given[-1], first).eq(0).all())
