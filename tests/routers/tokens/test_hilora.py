"""HiLoRA over components of rank 1: likelihoods, shares of the budget and the choice of each token, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave.errors import UnknownExpert, WeightingError
from loraweave.hub.embedders.hashing import Hashing

LAYER = "q"
TEXTS = {
    "e0": ["red apple", "green apple", "apple pie"],
    "e1": ["one two three", "four five", "two and two"],
    "e2": ["paris in france", "rome in italy"],
    "e3": ["apple in france", "two pies"],
}
SIZES = [4, 2, 5, 1]
# the components of each LoRA, padded by their number
TABLE = torch.tensor([[0, 1, 2, 3, 12], [4, 5, 12, 12, 12], [6, 7, 8, 9, 10], [11, 12, 12, 12, 12]])
ASKED = ["an apple", "two and four apples in rome", "zebra"]


@pytest.fixture
def pool(random_pool):
    return random_pool(*({LAYER: (rank, 32, 24)} for rank in SIZES))


def hilora(pool, **options):
    return lw.router("hilora", pool.rank_one(), **{"examples": TEXTS, "embedder": "hashing"} | options)


def log_likelihoods(texts):
    """Of each text for each LoRA, by the log density of the normal distribution."""
    of_lora = [Hashing().embed(own).astype(np.float64) for own in TEXTS.values()]
    variances = np.stack([rows.var(axis=0) for rows in of_lora])
    shared = variances.mean(axis=0)
    variances = (variances + shared) / 2 + shared.mean() * 1e-3
    vectors = Hashing().embed(texts).astype(np.float64)
    means = [rows.mean(axis=0) for rows in of_lora]
    return np.array([[log_normal(u, *of) for of in zip(means, variances, strict=True)] for u in vectors])


def log_normal(u, mean, variance):
    return -0.5 * ((u - mean) ** 2 / variance + np.log(2 * np.pi * variance)).sum()


def test_a_lora_has_the_share_of_its_likelihood_among_the_others(pool):
    made = hilora(pool, temperature=300.0)
    scores = log_likelihoods(ASKED) / 300.0
    expected = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    found = made.probabilities(made.vectors(ASKED)).numpy()
    assert np.allclose(found, expected, atol=1e-4)
    # neither alike nor certain, or the test would see little
    assert expected.max() < 0.9
    assert expected.min() < 0.1


@pytest.mark.parametrize(("nearest", "fraction"), [(1, 0.4), (2, 0.5), (3, 0.4), (4, 1.0)])
def test_the_budget_is_shared_out_among_the_likeliest_by_largest_remainders(pool, nearest, fraction):
    made = hilora(pool, nearest=nearest, fraction=fraction, temperature=300.0)
    found = made.of_texts(ASKED)
    for row, p in zip(found.tolist(), made.probabilities(made.vectors(ASKED)).tolist(), strict=True):
        order = sorted(range(4), key=lambda g: -p[g])
        taken, held = [], 0.0
        for g in order:
            if len(taken) < nearest or held < 0.9:
                taken.append(g)
            held += p[g]
        budget = max(1, round(fraction * sum(SIZES[g] for g in taken)))
        due = {g: budget * p[g] / sum(p[h] for h in taken) for g in taken}
        counts = {g: int(due[g]) for g in taken}
        for g in sorted(taken, key=lambda g: int(due[g]) - due[g])[: budget - sum(counts.values())]:
            counts[g] += 1
        expected = [min(counts.get(g, 0), SIZES[g]) for g in range(4) for _ in range(SIZES[g])]
        assert row == expected


def test_each_token_has_the_components_of_its_loras_that_change_it_most(pool):
    made = hilora(pool)
    x_BTI = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    counts = [[3, 0, 2, 1], [1, 2, 0, 0]]
    count_BTE = torch.tensor(counts, dtype=torch.float32).repeat_interleave(torch.tensor(SIZES), dim=1)[:, None]
    found = made.chosen(made.spectr.scores(x_BTI, LAYER), count_BTE, TABLE)
    for b, row in enumerate(counts):
        most = max(size for n, size in zip(row, SIZES, strict=True) if n)
        for t in range(7):
            expected = []
            for adapter, n in zip(pool.adapters.values(), row, strict=True):
                _, s, vh = np.linalg.svd((adapter.layers[LAYER].b_OR @ adapter.layers[LAYER].a_RI).double().numpy())
                lengths = [s[k] * abs(vh[k] @ x_BTI[b, t].double().numpy()) for k in range(adapter.rank)]
                best = sorted(range(adapter.rank), key=lambda k: -lengths[k])[:n]
                expected += [min(1.0, (most / sum(row)) ** 0.5) if k in best else 0.0 for k in range(adapter.rank)]
            assert np.allclose(found[b, t].numpy(), expected, atol=1e-6)


def test_a_text_that_is_clearly_of_one_lora_gets_that_lora_as_it_was_trained(pool):
    made = hilora(pool, fraction=1.0, temperature=1e-3)
    for asked, lora in (("red apple", "e0"), ("four five", "e1"), ("paris in france", "e2")):
        counts = dict(zip(made.experts, made.of_texts([asked])[0].tolist(), strict=True))
        assert {name for name, n in counts.items() if n} == {name for name in made.experts if name.startswith(f"{lora}#")}
        count_BTE = torch.tensor([[list(counts.values())]])
        x_BTI = torch.randn(1, 3, 32)
        w_BTE = made.chosen(made.spectr.scores(x_BTI, LAYER), count_BTE, TABLE)
        assert torch.equal(w_BTE, (count_BTE > 0).float().expand_as(w_BTE))


def test_loras_without_examples_and_unknown_ones_are_refused_by_name(pool):
    with pytest.raises(WeightingError, match=r"none of 'e1', 'e3'"):
        hilora(pool, examples={"e0": ["a"], "e2": ["b"]})
    with pytest.raises(UnknownExpert, match="e1#1"):
        hilora(pool, examples=TEXTS | {"e1#1": ["a"]})
    with pytest.raises(WeightingError, match="fraction=0"):
        hilora(pool, fraction=0.0)
