"""The five statistics are those of the dense update in numpy, and the detector is its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.errors import AdapterUnsupported
from loraweave.extensions.trust.backdoors import STATISTICS, BackdoorDetector, signature, spectral_statistics
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


def adapter(seed, scale=1.0, projections=("q_proj", "v_proj"), layers=2):
    names = [f"model.{layer}.{projection}" for layer in range(layers) for projection in projections]
    return Adapter(f"a{seed}", "base", {name: random_factors(10 * seed + n, scale=scale) for n, name in enumerate(names)})


def statistic(name, w_OI):
    """Each from the dense update, written out."""
    s = np.linalg.svd(w_OI, compute_uv=False)
    s = s[s > 1e-12 * s[0]]
    share = s**2 / np.sum(s**2)
    moment = [np.mean((w_OI - np.mean(w_OI)) ** power) for power in (2, 4)]
    return {
        "leading": np.linalg.norm(w_OI, 2),
        "norm": np.sqrt(np.sum(w_OI**2)),
        "energy": s[0] ** 2 / np.sum(w_OI**2),
        "entropy": -np.sum(share * np.log(share)),
        "kurtosis": moment[1] / moment[0] ** 2,
    }[name]


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 4), (2, 63, 2), (5, 3, 3)])
def test_a_statistic_is_that_of_the_dense_update(name, shape):
    update = random_factors(0, *shape)
    found = spectral_statistics(update)[STATISTICS.index(name)]
    assert found == pytest.approx(statistic(name, dense(update)), rel=1e-9, abs=1e-12)


def test_large_updates_are_read_in_blocks_with_the_same_kurtosis(monkeypatch):
    update = random_factors(1, 2, 63, 9)
    monkeypatch.setattr("loraweave.extensions.trust.backdoors._BLOCK", 20)
    assert spectral_statistics(update)[4] == pytest.approx(statistic("kurtosis", dense(update)), rel=1e-9)


def test_the_entropy_of_equal_singular_values_is_the_log_of_their_number():
    update = Factors(torch.eye(4, 6), torch.eye(5, 4))
    found = dict(zip(STATISTICS, spectral_statistics(update), strict=True))
    assert [found["entropy"], found["energy"]] == pytest.approx([np.log(4), 0.25])


def test_a_signature_is_the_mean_over_the_layers_of_a_projection():
    given = adapter(0)
    for projection, found in signature(given).items():
        own = [dense(given.layers[f"model.{layer}.{projection}"]) for layer in range(2)]
        expected = [np.mean([statistic(name, w_OI) for w_OI in own]) for name in STATISTICS]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_layers_of_zero_do_not_count():
    given = adapter(0)
    zero = Factors(torch.zeros(2, 7), torch.zeros(5, 2))
    more = Adapter("more", "base", {**given.layers, "model.2.q_proj": zero})
    np.testing.assert_array_equal(signature(more)["q_proj"], signature(given)["q_proj"])


def test_the_probability_is_the_formula_and_its_loss_is_least():
    clean, poisoned = [adapter(seed) for seed in range(12)], [adapter(seed, 1.4) for seed in range(12, 24)]
    detector = BackdoorDetector.fit(clean, poisoned)
    x_NF = np.stack([np.concatenate(list(signature(each).values())) for each in (*clean, *poisoned)])
    z_NF = (x_NF - x_NF.mean(axis=0)) / x_NF.std(axis=0)
    y_N = np.array([0] * 12 + [1] * 12)

    def loss(w_F, intercept):
        logit_N = z_NF @ w_F + intercept
        return np.sum(np.logaddexp(0, logit_N) - y_N * logit_N) + 0.5 * np.sum(w_F**2)

    w_F, least = np.array(detector.coefficients), loss(np.array(detector.coefficients), detector.intercept)
    for place in range(len(w_F)):
        for step in (-0.01, 0.01):
            assert loss(w_F + step * np.eye(len(w_F))[place], detector.intercept) > least
    expected_N = 1 / (1 + np.exp(-(z_NF @ w_F + detector.intercept)))
    found_N = [detector.probability(each) for each in (*clean, *poisoned)]
    np.testing.assert_allclose(found_N, expected_N, rtol=1e-9)
    assert np.mean(found_N[12:]) > np.mean(found_N[:12]) + 0.3


def test_other_projections_are_refused_with_both_lists():
    detector = BackdoorDetector.fit([adapter(0), adapter(1)], [adapter(2), adapter(3)])
    with pytest.raises(AdapterUnsupported, match="updates k_proj, and the detector knows q_proj, v_proj"):
        detector.probability(adapter(4, projections=("k_proj",)))


def test_one_adapter_on_a_side_is_refused():
    with pytest.raises(AdapterUnsupported, match="here 1 and 2"):
        BackdoorDetector.fit([adapter(0)], [adapter(2), adapter(3)])


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (Factors(torch.zeros(2, 5), torch.zeros(7, 2)), "zero"),
        (Factors(torch.ones(1, 5), torch.ones(7, 1), gain_O=torch.ones(7)), "DoRA"),
    ],
)
def test_updates_without_a_spectrum_are_refused(update, reason):
    with pytest.raises(AdapterUnsupported, match=reason):
        spectral_statistics(update)
    with pytest.raises(AdapterUnsupported):
        signature(Adapter("x", "base", {"q_proj": update}))
