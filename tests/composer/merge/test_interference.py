"""Interference figures against the dense updates, written out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import random_factors

from loraweave.composer.merge.interference import interference
from loraweave.types import Factors

factors = partial(random_factors, num_out=11, num_in=7)


def dense(update: Factors, weight: float) -> torch.Tensor:
    return weight * update.b_OR.double() @ update.a_RI.double()


def test_norms_and_cosines_are_those_of_the_weighted_dense_updates() -> None:
    experts, weights = [factors(0), factors(1, rank=1), factors(2, rank=5)], [0.7, -0.4, 2.0]
    found = interference(experts, weights)
    updates = [dense(f, w) for f, w in zip(experts, weights, strict=True)]
    assert found.norms == pytest.approx([float(d.norm()) for d in updates], rel=1e-5)
    pairs = [(0, 1), (0, 2), (1, 2)]
    wanted = [float((updates[i] * updates[j]).sum() / updates[i].norm() / updates[j].norm()) for i, j in pairs]
    assert found.cosines == pytest.approx(wanted, abs=1e-6)


def test_the_sign_conflict_is_the_share_of_entries_with_both_signs() -> None:
    experts, weights = [factors(0), factors(1), factors(2)], [1.0, -1.0, 0.5]
    signs = torch.stack([dense(f, w).sign() for f, w in zip(experts, weights, strict=True)])
    wanted = float(((signs > 0).any(0) & (signs < 0).any(0)).double().mean())
    assert interference(experts, weights).sign_conflict == pytest.approx(wanted)


def test_entries_that_nobody_touches_do_not_count() -> None:
    left = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
    right = Factors(torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0], [0.0]]))
    # entries: (1 and -1), (0 and 1), and a row of zeros
    assert interference([left, right], [1.0, 1.0]).sign_conflict == 0.5


def test_large_layers_are_sampled_close_to_the_truth() -> None:
    experts = [factors(seed, num_out=300, num_in=410) for seed in range(2)]
    opposite = (dense(experts[0], 1.0) * dense(experts[1], 1.0) < 0).double().mean()
    assert interference(experts, [1.0, 1.0]).sign_conflict == pytest.approx(float(opposite), abs=0.02)


def test_an_absent_expert_and_a_zero_update_have_no_norm_and_no_cosine() -> None:
    zero = Factors(torch.zeros(2, 7), torch.zeros(11, 2))
    found = interference([factors(0), None, zero], [1.0, 1.0, 1.0])
    assert found.norms[1:] == (0.0, 0.0)
    assert found.cosines == (0.0, 0.0, 0.0)


def test_one_expert_conflicts_with_nobody() -> None:
    found = interference([factors(0)], [1.0])
    assert (found.cosines, found.sign_conflict) == ((), 0.0)
