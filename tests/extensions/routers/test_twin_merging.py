"""Twin-Merging: the formula by dense matrices and numpy's SVD, and what of the pool's experts it gives back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave import registry
from loraweave.errors import UnknownExpert, WeightingError

twin_merging = pytest.importorskip(f"{registry.EXTENSIONS}.methods").twin_merging

LAYER = "q"
EXAMPLES = {"e0": ["red apple", "a pear"], "e1": ["one two", "four"], "e2": ["paris in france", "rome"]}
TEXTS = ["an apple", "two and four", "is rome in france"]


@pytest.fixture(scope="module")
def pool(random_pool):
    return random_pool({LAYER: (3, 7, 9)}, {LAYER: (2, 7, 9), "other": (2, 4, 5)}, {LAYER: (4, 7, 9)})


@pytest.fixture(scope="module")
def shared(pool):
    return lw.merge([*pool.adapters.values()], [0.3, 0.3, 0.3], method="ties", density=0.6, progress=False)


def delta(adapter, layer=LAYER):
    factors = adapter.layers[layer]
    return factors.b_OR.double().numpy() @ factors.a_RI.double().numpy()


def twin(parts, **options):
    return lw.router("twin_merging", parts, **{"examples": EXAMPLES, "embedder": "hashing"} | options)


def mixed(parts, w_E):
    """The layer's dense update under weights in the order of the pool."""
    return sum(w * delta(parts[name]) for name, w in zip(parts.names, w_E, strict=True))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_an_exclusive_part_is_the_difference_from_the_shared_one_cut_to_its_largest_singular_values(pool, shared, rank):
    parts = twin_merging(pool, shared, rank=rank, progress=False)
    assert parts.names == ("shared", "e0", "e1", "e2")
    assert np.array_equal(delta(parts["shared"]), delta(shared))
    for name in pool:
        u, s, vh = np.linalg.svd(delta(pool[name]) - delta(shared))
        assert np.allclose(delta(parts[name]), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-4)
        assert parts[name].rank <= rank


def test_a_text_gets_the_shared_part_and_the_softmax_over_the_exclusive_ones(pool, shared):
    parts = twin_merging(pool, shared, progress=False)
    p_NT = lw.router("logistic", pool, examples=EXAMPLES, embedder="hashing", form="probabilities").of_texts(TEXTS)
    assert torch.allclose(twin(parts).of_texts(TEXTS), torch.cat([torch.ones(3, 1), p_NT], dim=1), atol=1e-5)
    # wherever the shared part stands
    turned = parts.subset(["e1", "shared", "e0", "e2"])
    expected = torch.stack([p_NT[:, 1], torch.ones(3), p_NT[:, 0], p_NT[:, 2]], dim=1)
    assert torch.allclose(twin(turned).of_texts(TEXTS), expected, atol=1e-4)


def test_without_a_cut_a_text_gets_the_weighted_sum_of_the_experts_whatever_is_shared(pool, shared):
    for common in (shared, pool["e1"]):
        parts = twin_merging(pool, common, rank=99, progress=False)
        for w_E in twin(parts).of_texts(TEXTS).tolist():
            assert sum(w_E) == pytest.approx(2.0)
            assert np.allclose(mixed(parts, w_E), mixed(pool, w_E[1:]), atol=1e-4)


def test_exclusive_parts_keep_the_examples_by_which_texts_choose_them(pool, shared):
    shown = lw.ExpertPool({name: replace(pool[name], card={"examples": EXAMPLES[name]}) for name in pool})
    made = twin(twin_merging(shown, shared, progress=False), examples=None, template=None)
    assert made.of_texts(["red apple"])[0].argsort(descending=True)[:2].tolist() == [0, 1]


def test_what_cannot_be_meant_is_refused_by_name(pool, shared):
    parts = twin_merging(pool, shared, progress=False)
    with pytest.raises(UnknownExpert, match="'common'"):
        twin(parts, shared="common")
    with pytest.raises(WeightingError, match="the shared part 'shared' alone"):
        twin(parts.subset(["shared"]))
    with pytest.raises(WeightingError, match="needs examples of every expert, and has none of 'e1', 'e2'"):
        twin(parts, examples={"e0": ["x"]})
    with pytest.raises(WeightingError, match="has an expert of that name"):
        twin_merging(parts, shared, progress=False)
    with pytest.raises(WeightingError, match="rank=0"):
        twin_merging(pool, shared, rank=0)
