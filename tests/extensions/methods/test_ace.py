"""ACE-Merging on factors beside its formula on dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import random_factors

from loraweave.errors import WeightingError
from loraweave.extensions.methods.methods.ace import ace
from loraweave.types import Factors


def updates(sizes, num_out, num_in, rank):
    draw = torch.Generator().manual_seed(5)
    return [random_factors(draw, rank, num_out, num_in, scale=size) for size in sizes]


def dense(experts, weights, eps=1e-2, k_fraction=0.3):
    """The formula in numpy, with whole covariances and inverses; and whether sizes differ much."""
    deltas = [w * (f.b_OR.double() @ f.a_RI.double()).numpy() for f, w in zip(experts, weights, strict=True)]
    num_in = deltas[0].shape[1]
    traces = np.array([np.trace(d.T @ d) for d in deltas])
    logs = np.log(traces + 1e-12)
    uneven = len(deltas) > 1 and logs.var(ddof=1) / logs.mean() ** 2 > 0.3
    centred = [d - d.mean(axis=0, keepdims=True) for d in deltas]
    covariances = [c.T @ c for c in centred]
    sizes = [np.trace(s) if uneven else 1.0 for s in covariances]
    covariances = [s / size for s, size in zip(covariances, sizes, strict=True)]
    damped = [s + eps / size * np.eye(num_in) for s, size in zip(covariances, sizes, strict=True)]
    mean_row = sum(covariances).mean(axis=0, keepdims=True)
    if uneven:
        mean_row = mean_row / traces.mean()
    merged = sum(c @ g for c, g in zip(centred, damped, strict=True)) @ np.linalg.inv(sum(damped) + mean_row)
    if uneven:
        mean = sum(damped) / len(deltas)
        fused = merged + sum(d @ (s - mean) for d, s in zip(deltas, covariances, strict=True))
        u, s, vh = np.linalg.svd(fused, full_matrices=False)
        kept = min(int(min(fused.shape) * k_fraction), int((s > 1e-9 * s[0]).sum()))
        merged = merged + s[:kept].mean() * u[:, :kept] @ vh[:kept]
    return merged, uneven


@pytest.mark.parametrize(
    ("sizes", "shape", "rank", "weights", "uneven"),
    [
        ((1.0, 0.9, 1.2), (11, 13), 3, (1.0, 1.0, 1.0), False),
        ((1.0, 0.5), (40, 24), 2, (0.7, -0.4), False),
        ((1.0, 1e-3, 0.2), (11, 13), 3, (1.0, 1.0, 1.0), True),
        ((0.3, 1e-2), (30, 50), 4, (0.5, 2.0), True),
        ((1.0, 1.0), (5, 4), 6, (1.0, 1.0), False),
        ((0.4,), (9, 7), 2, (1.0,), False),
    ],
)
def test_it_is_the_formula_on_whole_matrices(sizes, shape, rank, weights, uneven):
    experts = updates(sizes, *shape, rank)
    expected, found_uneven = dense(experts, weights)
    assert found_uneven == uneven
    found = ace(experts, weights)
    delta = (found.b_OR.double() @ found.a_RI.double()).numpy()
    assert np.allclose(delta, expected, atol=2e-5 * np.abs(expected).max())
    assert found.rank <= min(min(shape), rank * len(sizes))


def test_options_change_what_they_say():
    experts = updates((0.3, 1e-2), 30, 50, 4)
    for options in ({"eps": 0.5}, {"k_fraction": 0.05}):
        expected, _ = dense(experts, (1.0, 1.0), **options)
        found = ace(experts, (1.0, 1.0), **options)
        assert np.allclose((found.b_OR @ found.a_RI).numpy(), expected, atol=2e-5 * np.abs(expected).max())


def test_experts_without_an_update_leave_nothing():
    zero = Factors(torch.zeros(2, 5), torch.zeros(4, 2))
    assert ace([zero, zero], [1.0, 1.0]).rank == 0


def test_options_outside_their_range_are_refused_by_name():
    from loraweave.composer.merge.method_call import MethodCall

    for options in ({"eps": 0.0}, {"k_fraction": 1.5}, {"eps": math.nan}):
        with pytest.raises(WeightingError, match=next(iter(options))):
            MethodCall("ace", options)
