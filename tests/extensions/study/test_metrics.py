"""Metrics against the packages' own corpus scores, and figures against draws written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

from loraweave.errors import PackageMissing
from loraweave.extensions.study import results
from loraweave.extensions.study.cells import Answers
from loraweave.extensions.study.metrics import metric_of
from loraweave.retrieval.fusion import wilson

ANSWERS = ["the cat sat on the mat", "A dog", "nothing to see here today", ""]
TARGETS = [["the cat sat on a mat", "a cat was on the mat"], ["a dog."], ["there is nothing to see here"], ["some words"]]
LOSSES, TOKENS = [0.5, 1.0, 0.25, 2.0], [6, 2, 6, 2]


def value(name, normalise=None, functions=(), places=range(4)):
    metric = metric_of(name, normalise, dict(functions))
    counts_NK = metric.parts(ANSWERS, TARGETS, LOSSES, TOKENS)[list(places)]
    return float(metric.value(np.append(counts_NK.sum(axis=0), len(counts_NK))))


@pytest.mark.parametrize("places", [range(4), [0, 0, 2], [1]])
def test_bleu_and_chrf_are_sacrebleus_of_the_corpus_and_of_any_sample_of_it(places):
    sacrebleu = pytest.importorskip("sacrebleu")
    said = [ANSWERS[place] for place in places]
    references = [[TARGETS[place][min(number, len(TARGETS[place]) - 1)] for place in places] for number in range(2)]
    assert value("bleu", places=places) == pytest.approx(sacrebleu.corpus_bleu(said, references).score / 100)
    assert value("chrf", places=places) == pytest.approx(sacrebleu.corpus_chrf(said, references).score / 100)


def test_rouge_is_that_of_the_nearest_target():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    best = [max(scorer.score(t, a)["rougeL"].fmeasure for t in own) for a, own in zip(ANSWERS, TARGETS, strict=True)]
    assert value("rouge") == pytest.approx(sum(best) / 4)


def test_f1_is_over_words_without_case_punctuation_and_articles():
    # cat sat on mat / cat sat on mat: 1; dog / dog: 1; nothing to see here today / there is nothing to see here: 2*4/(5+6)
    assert value("f1") == pytest.approx((1 + 1 + 8 / 11 + 0) / 4)
    assert value("f1", normalise=[]) == pytest.approx((10 / 12 + 0 + 8 / 11 + 0) / 4)


def test_exact_match_trims_and_normalises_as_asked():
    assert value("exact_match") == 0.0
    assert value("accuracy", normalise=["case", "punctuation"]) == 1 / 4


def test_perplexity_is_of_tokens_and_a_function_is_averaged_over_items():
    assert value("perplexity") == pytest.approx(math.exp((0.5 * 6 + 1.0 * 2 + 0.25 * 6 + 2.0 * 2) / 16))
    assert value("length", functions={"length": lambda answer, targets: len(answer)}) == sum(map(len, ANSWERS)) / 4


@pytest.mark.parametrize(("name", "module"), [("bleu", "sacrebleu.metrics"), ("rouge", "rouge_score.rouge_scorer")])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, name, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(PackageMissing, match=r"pip install 'loraweave\[study\]'"):
        metric_of(name, None, {})


def drawn(right, metric="exact_match"):
    """The draws of a task whose items were answered right or wrong, seed by seed."""
    count = len(right[0])
    task = SimpleNamespace(name="t", test=[("", ["a"])] * count)
    rest = (1.0,) * count, (1,) * count, 0.0, 0.0, "", {}, ""
    answers = {seed: Answers(tuple("a" if hit else "b" for hit in hits), *rest) for seed, hits in enumerate(right)}
    return results._draws(task, metric_of(metric, None, {"half": lambda answer, _: 0.5 * (answer == "a")}), answers, [0, 1])


def test_a_figure_is_the_mean_over_seeds_and_its_draws_resample_seeds_and_items():
    right = [[True] * 30 + [False] * 10, [True] * 10 + [False] * 30]
    draws_R = drawn(right).values_R
    assert draws_R[0] == 0.5
    generator = np.random.default_rng(1)
    seeds_RS, items_RN = generator.integers(0, 2, (4000, 2)), generator.integers(0, 40, (4000, 40))
    expected_R = np.array(right)[seeds_RS[:, :, None], items_RN[:, None, :]].mean(axis=(1, 2))
    assert np.percentile(draws_R[1:], [2.5, 97.5]) == pytest.approx(np.percentile(expected_R, [2.5, 97.5]), abs=0.03)


@pytest.mark.parametrize(("right", "count"), [(12, 12), (2, 2), (0, 5), (9, 12)])
def test_the_interval_of_a_share_of_one_seed_is_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(method="wilson")
    found = drawn([[True] * right + [False] * (count - right)]).summed()
    assert found == pytest.approx((right / count, expected.low, expected.high), rel=1e-12)


def test_the_interval_of_a_share_over_seeds_or_tasks_is_wilsons_with_the_variance_of_the_draws():
    over_seeds = drawn([[True] * 30 + [False] * 10, [True] * 10 + [False] * 30])
    over_tasks = results.Draws.mean([drawn([[True] * 3 + [False]]), drawn([[True] + [False] * 4])])
    for draws in (over_seeds, over_tasks):
        share = draws.values_R[0]
        as_many = share * (1 - share) / draws.values_R[1:].var()
        assert draws.summed() == pytest.approx((share, *wilson(share, as_many)), rel=1e-12)
    # where the draws say nothing, the items of all tasks count
    assert results.Draws.mean([drawn([[True] * 4]), drawn([[True] * 8])]).summed() == (1.0, *wilson(1.0, 12))


def test_a_value_that_is_no_share_keeps_the_percentiles_of_its_draws():
    draws = drawn([[True] * 6 + [False] * 2], "half")
    low, high = np.percentile(draws.values_R[1:], [2.5, 97.5])
    assert draws.summed() == (0.375, low, high)
