"""The closed forms against refitting, in the primal, without each fold."""

from __future__ import annotations

import numpy as np
import pytest

from loraweave.retrieval import kernel_ridge
from loraweave.retrieval.kernel_ridge import Choice


@pytest.fixture
def samples():
    """Unit rows (23, 5) of three classes of 7, 7 and 9 samples, with their labels."""
    rng = np.random.default_rng(0)
    labels_N = np.repeat([0, 1, 2], [7, 7, 9])
    rows_ND = rng.standard_normal((3, 5))[labels_N] + rng.standard_normal((23, 5))
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True), labels_N


def directions(rows_ND, labels_N, ridge):
    """W_DC = (X^T X + ridge I)^-1 X^T Y, at norm 1: the same regression without any kernel."""
    targets_NC = (labels_N[:, None] == np.arange(3)).astype(float)
    w_DC = np.linalg.solve(rows_ND.T @ rows_ND + ridge * np.eye(rows_ND.shape[1]), rows_ND.T @ targets_NC)
    norms_C = np.linalg.norm(w_DC, axis=0)
    return w_DC / np.where(norms_C > 0, norms_C, np.inf)


@pytest.mark.parametrize("ridge", [0.1, 3.0, 300.0])
def test_the_cosines_are_those_of_the_ridge_regression_written_out(samples, ridge):
    rows_ND, labels_N = samples
    query_QD = np.random.default_rng(1).standard_normal((4, 5))
    found_QC = kernel_ridge.fit(rows_ND @ rows_ND.T, labels_N, ridge).cosines(query_QD @ rows_ND.T)
    np.testing.assert_allclose(found_QC, query_QD @ directions(rows_ND, labels_N, ridge), atol=1e-9)


@pytest.mark.parametrize("ridge", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("folds", ["each sample", "one of each class", "each class"])
def test_what_is_held_out_is_what_refitting_without_it_gives(samples, ridge, folds):
    rows_ND, labels_N = samples
    folds_N = {
        "each sample": np.arange(23),
        "one of each class": np.concatenate([np.arange(7), np.arange(7), np.arange(9)]),
        "each class": labels_N,
    }[folds]
    expected_NC = np.empty((23, 3))
    for fold in set(folds_N.tolist()):
        rest_N = folds_N != fold
        expected_NC[~rest_N] = rows_ND[~rest_N] @ directions(rows_ND[rest_N], labels_N[rest_N], ridge)
    found_NC = kernel_ridge.held_out(rows_ND @ rows_ND.T, labels_N, folds_N, ridge)
    np.testing.assert_allclose(found_NC, expected_NC, atol=1e-7)


def test_the_choice_is_no_worse_than_its_start_and_drops_a_kernel_of_noise(samples):
    rows_ND, labels_N = samples
    noise_ND = np.random.default_rng(2).standard_normal((23, 40))
    noise_ND /= np.linalg.norm(noise_ND, axis=1, keepdims=True)
    kernels_PNN = np.stack([noise_ND @ noise_ND.T, rows_ND @ rows_ND.T])
    folds_N = np.arange(23)
    found = kernel_ridge.choose(kernels_PNN, labels_N, folds_N, Choice(np.array([0.75, 0.25]), 1.0))
    assert found.shares_P[0] < 0.25
    assert found.shares_P.sum() == pytest.approx(1.0)

    def loss(shares_P, ridge, temperature):
        cosines_NC = kernel_ridge.held_out(np.tensordot(shares_P, kernels_PNN, 1), labels_N, folds_N, ridge)
        odds_NC = np.exp(cosines_NC / temperature)
        return -np.log(odds_NC[np.arange(23), labels_N] / odds_NC.sum(axis=1)).mean()

    assert found.loss == pytest.approx(loss(found.shares_P, found.ridge, found.temperature))
    assert found.loss < min(loss(np.array([0.75, 0.25]), 1.0, each) for each in kernel_ridge.TEMPERATURES)
    # from the best of the second kernel alone, the first can only be left out or help
    alone = kernel_ridge.choose(kernels_PNN[1:], labels_N, folds_N, Choice(np.ones(1), 30.0))
    both = kernel_ridge.choose(kernels_PNN, labels_N, folds_N, Choice(np.array([0.0, 1.0]), alone.ridge))
    assert both.loss <= alone.loss


def test_without_two_samples_of_a_class_nothing_is_chosen():
    start = Choice(np.array([0.5, 0.5]), 3.0)
    assert kernel_ridge.choose(np.stack([np.eye(4)] * 2), np.arange(4), np.zeros(4, int), start) is start
