"""What the spectral methods share: one orthonormal basis, and what none of them does to inputs and biases."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave import registry
from loraweave.composer.merge.methods._core import joint, shared_basis, spectra
from loraweave.composer.merge.methods._terms import terms
from loraweave.types import Factors

factors = partial(random_factors, num_out=9, num_in=11)


def test_the_basis_spans_and_is_orthonormal_and_has_its_largest_entries_positive() -> None:
    experts = [factors(0, 2), factors(1, 3), factors(0, 2)]
    experts_S = joint(spectra(terms(experts, [1.0, -3.0, 0.1])))
    basis, inside = shared_basis(experts_S.u_OS, experts_S.s_S)
    assert torch.allclose(basis @ inside, experts_S.u_OS, atol=1e-12)
    assert basis.shape == (9, 5)
    assert torch.allclose(basis.T @ basis, torch.eye(5).double(), atol=1e-12)
    assert bool((basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)) > 0).all())
    u = np.linalg.svd(np.hstack([dense(f) for f in experts]))[0][:, :5]
    assert np.abs(np.abs(u.T @ basis.numpy()) - np.eye(5)).max() < 1e-6


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv"])
def test_inputs_that_no_expert_sees_stay_unseen(name: str) -> None:
    experts = [factors(0, 2), factors(1, 2)]
    unseen = np.linalg.svd(np.vstack([f.a_RI.double().numpy() for f in experts]))[2][4:].T
    assert np.abs(dense(registry.get("methods", name)(experts, [1.0, 1.0])) @ unseen).max() < 1e-5


@pytest.mark.parametrize(("name", "options"), [("tsv", {}), ("wudi", {"minimiser": "exact"})])
def test_an_equal_update_in_other_factors_is_the_same_update(name: str, options: dict[str, str]) -> None:
    f = factors(0, 3)
    turn = (torch.randn(3, 3, generator=torch.Generator().manual_seed(7)) + 3 * torch.eye(3)).double()
    split = Factors((turn @ f.a_RI.double()).float(), (f.b_OR.double() @ torch.linalg.inv(turn)).float())
    assert np.abs(dense(registry.get("methods", name)([f, split], [1.0, 1.0], **options)) - dense(f)).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "scale"),
    [("iso_c", 2.0), ("iso_cts", 2.0), ("tsv", 2.0), ("robust_merge", 2.0), ("wudi", None), ("lego", None)],
)
def test_biases_are_summed_with_weights_and_scaled(name: str, scale: float | None) -> None:
    experts = [factors(0, 2, bias_O=torch.ones(9)), factors(1, 1), factors(2, 1, bias_O=torch.ones(9))]
    options = {} if scale is None else {"scale": scale}
    found = registry.get("methods", name)(experts, [0.5, 1.0, 2.0], **options)
    assert torch.equal(found.bias_O, torch.full((9,), 2.5 * (scale or 1.0)))
