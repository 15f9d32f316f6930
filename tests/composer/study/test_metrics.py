"""Metrics against the packages' own corpus scores, and figures against draws written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from loraweave.composer.study import results
from loraweave.composer.study.cells import Answers
from loraweave.composer.study.metrics import metric_of
from loraweave.errors import PackageMissing

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


def test_a_figure_is_the_mean_over_seeds_and_its_interval_that_of_resampled_seeds_and_items():
    targets = [["a"]] * 40
    task = SimpleNamespace(name="t", test=[("", own) for own in targets])
    right = [[True] * 30 + [False] * 10, [True] * 10 + [False] * 30]
    rest = (1.0,) * 40, (1,) * 40, 0.0, 0.0, "", {}
    answers = {seed: Answers(tuple("a" if hit else "b" for hit in hits), *rest) for seed, hits in enumerate(right)}
    draws_R = results._draws(task, metric_of("exact_match", None, {}), answers, [0, 1])
    assert draws_R[0] == 0.5
    generator = np.random.default_rng(1)
    seeds_RS, items_RN = generator.integers(0, 2, (4000, 2)), generator.integers(0, 40, (4000, 40))
    expected_R = np.array(right)[seeds_RS[:, :, None], items_RN[:, None, :]].mean(axis=(1, 2))
    assert np.percentile(draws_R[1:], [2.5, 97.5]) == pytest.approx(np.percentile(expected_R, [2.5, 97.5]), abs=0.03)
