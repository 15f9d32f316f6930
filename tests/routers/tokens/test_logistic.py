"""A classifier of texts as a router: it is scikit-learn's, kept as two tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import loraweave as lw
from loraweave.errors import InvalidTask, UnknownExpert, WeightingError
from loraweave.hub.embedders.hashing import Hashing

EXAMPLES = {"a": ["red apple", "green apple", "a pear"], "b": ["one two", "four"], "c": ["paris in france", "rome"]}
TEXTS = ["an apple", "two and four", "is rome in france"]


def logistic(pool, **options):
    return lw.router("logistic", pool, **{"examples": EXAMPLES, "embedder": "hashing"} | options)


def reference(examples=EXAMPLES, **settings):
    """p_NE of scikit-learn's own predict_proba."""
    embed = Hashing().embed
    rows = embed([text for own in examples.values() for text in own]).astype(np.float64)
    labels = [name for name, own in examples.items() for _ in own]
    model = LogisticRegression(**{"C": 10.0, "tol": 1e-10, "max_iter": 10_000} | settings).fit(rows, labels)
    return model.predict_proba(embed(TEXTS).astype(np.float64))


def test_probabilities_are_those_of_scikit_learn(pool):
    for strength in (0.5, 10.0):
        found = logistic(pool, form="probabilities", inverse_penalty=strength).of_texts(TEXTS)
        assert np.allclose(found.numpy(), reference(C=strength), atol=1e-4)


def test_the_embedders_id_is_kept_in_bytes(pool):
    assert bytes(logistic(pool).embedder_id_.numpy()).decode() == Hashing().id


def test_a_selection_is_the_likeliest_alone(pool):
    assert torch.equal(logistic(pool).of_texts(TEXTS), torch.eye(3)[torch.from_numpy(reference().argmax(axis=1))])


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_by_top_p_the_fewest_experts_that_suffice_have_the_softmax_of_their_probabilities(pool, top_p):
    found = logistic(pool, form="top_p", top_p=top_p, inverse_penalty=0.5).of_texts(TEXTS).tolist()
    for p_E, w_E in zip(reference(C=0.5).tolist(), found, strict=True):
        kept, total = [], 0.0
        for e in sorted(range(3), key=lambda e: -p_E[e]):
            if total < top_p - 1e-9:
                kept.append(e)
                total += p_E[e]
        parts = [np.exp(p_E[e]) if e in kept else 0.0 for e in range(3)]
        assert w_E == pytest.approx([part / sum(parts) for part in parts], abs=1e-4)


def test_a_top_p_of_nothing_is_refused(pool):
    with pytest.raises(WeightingError, match="top_p"):
        logistic(pool, form="top_p", top_p=0.0)


def test_of_two_experts_the_probabilities_are_those_of_one_logit(pool):
    two = {name: EXAMPLES[name] for name in ("a", "b")}
    found = logistic(pool.subset(["a", "b"]), examples=two, form="probabilities").of_texts(TEXTS)
    assert np.allclose(found.numpy(), reference(two), atol=1e-4)
    assert torch.equal(logistic(pool.subset(["a"]), examples={"a": ["x"]}).of_texts(TEXTS), torch.ones(3, 1))


def test_neither_the_order_of_experts_nor_of_texts_matters(pool):
    turned = {name: EXAMPLES[name][::-1] for name in ("c", "b", "a")}
    second = logistic(pool.subset(["c", "b", "a"]), examples=turned, form="probabilities").of_texts(TEXTS)
    assert torch.allclose(second.flip(1), logistic(pool, form="probabilities").of_texts(TEXTS), atol=1e-4)


def test_every_form_of_a_data_set_gives_the_same_router(pool, engine):
    pairs = {name: [(text, "yes") for text in own] for name, own in EXAMPLES.items()}
    tasks = {name: lw.Task(own, instruction=f"do {name}", template="{instruction} {input}") for name, own in pairs.items()}
    prompts = {name: [f"do {name} {text}" for text in own] for name, own in EXAMPLES.items()}
    rows = [{"input": i, "target": t, "expert": name} for name, own in pairs.items() for i, t in own]
    bare = {name: [f"\nInput: {text}\nOutput:" for text in own] for name, own in EXAMPLES.items()}
    for dataset, expected in ((tasks, prompts), (prompts, prompts), (pairs, bare), (rows, bare)):
        found = lw.router("logistic", pool, embedder="hashing", form="probabilities").fit(engine, dataset).of_texts(TEXTS)
        assert torch.equal(found, logistic(pool, examples=expected, form="probabilities").of_texts(TEXTS))


def test_saved_it_is_two_tensors_and_gives_the_same(pool, tmp_path):
    made = logistic(pool, form="probabilities")
    made.save_pretrained(tmp_path / "router")
    assert sorted(path.name for path in (tmp_path / "router").iterdir()) == ["router.json", "router.safetensors"]
    assert torch.equal(lw.router(tmp_path / "router").of_texts(TEXTS), made.of_texts(TEXTS))


def test_before_it_was_fitted_it_says_so(pool, engine):
    with pytest.raises(WeightingError, match="knows no text of its experts yet: fit"):
        lw.router("logistic", pool, embedder="hashing").of_texts(TEXTS)
    with pytest.raises(WeightingError, match="knows no text"), engine.activate(lw.router("logistic", pool)):
        engine.model(torch.tensor([[5]]))


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ({}, InvalidTask, "the data set is empty"),
        ({"a": ["x"]}, WeightingError, "needs examples of every expert, and has none of 'b', 'c'"),
        ({**EXAMPLES, "d": ["x"]}, UnknownExpert, "no expert 'd'"),
        ([("x", "y")], InvalidTask, "row 1 of the data set.* names no expert"),
        ([{"input": "x", "target": "y"}], InvalidTask, "row 1 of the data set.* names no expert"),
        ({"a": []}, WeightingError, "has none of 'a', 'b', 'c'"),
    ],
)
def test_a_data_set_without_the_labels_it_needs_is_refused(pool, engine, dataset, error, message):
    with pytest.raises(error, match=message):
        lw.router("logistic", pool, embedder="hashing").fit(engine, dataset)


def test_experts_without_examples_are_named(pool):
    with pytest.raises(WeightingError, match="has none of 'b', 'c'"):
        logistic(pool, examples={"a": ["x"]})


def test_the_engines_own_fit_points_to_the_routers(pool, engine):
    with pytest.raises(lw.TrainingError, match=r"router\.fit"):
        engine.fit(logistic(pool), EXAMPLES)
