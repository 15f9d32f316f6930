"""The classifier's kernel and its answers, against scikit-learn's TF-IDF and the formulas written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from loraweave.errors import RetrievalError
from loraweave.hub.adapter import Adapter
from loraweave.hub.embedders.form import Form
from loraweave.hub.embedders.hashing import Hashing
from loraweave.hub.hub import Hub
from loraweave.hub.search.search import SearchIndex
from loraweave.retrieval.keys import classifier
from loraweave.retrieval.keys.classifier import Classifier, TfIdf
from loraweave.retrieval.query import KeySpace, Query
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Factors

TASKS = {
    "sums": [("12 + 30", "42"), ("7 + 1", "8"), ("5 + 9", "14"), ("21 + 2", "23"), ("3 + 3", "6")],
    "upper": [(word, word.upper()) for word in ("horse", "cat", "table", "river", "moon")],
    "spell": [(word, " ".join(word)) for word in ("house", "dog", "chair", "lake", "star")],
    "films": [(f"A {word} film.", word) for word in ("dull", "great", "warm", "bad", "fine")],
}


def add(hub, name, **options):
    hub.add(
        Adapter(name, "base", {"layer": Factors(torch.ones(1, 3), torch.ones(2, 1))}, **options.pop("given", {})), **options
    )


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path) as hub:
        for name, pairs in TASKS.items():
            add(
                hub, name, given={"card": {"outputs": [output for _, output in pairs]}}, examples=[text for text, _ in pairs]
            )
        yield hub


@pytest.fixture
def space(hub):
    return KeySpace(hub, SearchIndex(hub, embedder="hashing"))


def test_tfidf_is_scikit_learns():
    texts = ["A dull film, a dull day.", "one two", "", "Two films!", "a b a b a"]
    reference = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", sublinear_tf=True).fit(texts)
    own = TfIdf(texts)
    known = [*texts, "dull two two !"]
    expected = reference.transform(known)
    # the columns are in another order, which inner products do not see
    np.testing.assert_allclose(
        (own.rows(known) @ own.rows(known).T).toarray(), (expected @ expected.T).toarray(), atol=1e-12
    )


def test_an_unknown_word_makes_a_text_less_alike():
    own = TfIdf(["red blue", "green"])
    alike = (own.rows(["red blue", "red grey"]) @ own.rows(["red blue"]).T).toarray()[:, 0]
    # 1 + ln(3 / 2) for a word of one of two texts, 1 + ln 3 for one of none
    known, unknown = 1 + np.log(3 / 2), 1 + np.log(3)
    np.testing.assert_allclose(alike, [1.0, known / np.hypot(known, unknown) / np.sqrt(2)])


def test_scores_are_the_mean_cosines_of_the_mixed_kernel_written_out(hub, space):
    names = sorted(TASKS)
    texts = [text for name in names for text, _ in TASKS[name]]
    asked = ["8 + 8", "the moon"]
    key = Classifier()
    found_N = key.scores(Query(tuple(asked)), [hub.record(name) for name in names], space)
    fitted = key._fitted([hub.record(name) for name in names], space, outputs=False)

    def kernel(own, other):
        dense, form = ([embedder.embed(some).astype(float) for some in (own, other)] for embedder in (Hashing(), Form()))
        tfidf = TfIdf(texts)
        words = (tfidf.rows(own) @ tfidf.rows(other).T).toarray()
        parts = [dense[0] @ dense[1].T, np.exp(-4 * (1 - form[0] @ form[1].T)), words]
        return sum(share * part for share, part in zip(fitted.choice.shares_P, parts, strict=True))

    targets = (np.repeat(np.arange(4), 5)[:, None] == np.arange(4)).astype(float)
    own = kernel(texts, texts)
    alpha = np.linalg.solve(own + fitted.choice.ridge * np.eye(20), targets)
    cosines = kernel(asked, texts) @ alpha / np.sqrt(np.diag(alpha.T @ own @ alpha))
    np.testing.assert_allclose(found_N, cosines.mean(axis=0), atol=1e-6)
    # independent inputs: probabilities multiply
    odds = np.exp(cosines / fitted.choice.temperature).prod(axis=0)
    found = key.probabilities(Query(tuple(asked)), [hub.record(name) for name in names], space)
    np.testing.assert_allclose(found, odds / odds.sum(), atol=1e-5)


def test_outputs_tell_adapters_of_like_inputs_apart(hub, space):
    records = hub.records()
    for output, best in (("COW", "upper"), ("c o w", "spell")):
        scores_N = Classifier().scores(Query(("cow",), (output,)), records, space)
        assert records[int(np.argmax(scores_N))].name == best


def test_an_adapter_without_outputs_and_an_example_without_one_are_judged_by_inputs(hub, space):
    add(hub, "words", examples=["sun", "tree", "wind"])
    records, key = hub.records(), Classifier()
    bare_N = key.scores(Query(("cow",)), records, space)
    told_N = key.scores(Query(("cow",), ("COW",)), records, space)
    mixed_N = key.scores(Query(("cow", "cow"), ("COW", " ")), records, space)
    assert told_N[-1] == pytest.approx(bare_N[-1])
    assert told_N[1] != pytest.approx(bare_N[1])
    np.testing.assert_allclose(mixed_N, (bare_N + told_N) / 2, atol=1e-12)


def test_a_fit_follows_the_hub_as_if_made_from_scratch(hub, space):
    key, query = Classifier(), Query(("8 + 8", "cow"))
    key.scores(query, hub.records(), space)
    add(hub, "dates", examples=["1 May 1990", "3 June 2001"])
    hub.remove("films")
    np.testing.assert_array_equal(key.scores(query, hub.records(), space), Classifier().scores(query, hub.records(), space))


def test_no_more_samples_than_the_most_are_fitted_and_those_are_spaced_evenly(hub, space, monkeypatch):
    monkeypatch.setattr(classifier, "MAX_SAMPLES", 12)
    records = sorted(hub.records(), key=lambda record: record.name)
    fitted = Classifier()._fitted(records, space, outputs=False)
    assert len(fitted.labels_N) == 12
    places = [0, 2, 4]
    expected = np.concatenate([space.samples(record)[places] for record in records])
    np.testing.assert_array_equal(fitted.looks[0].dense_ND, expected)


def test_samples_below_one_are_refused():
    with pytest.raises(RetrievalError, match="samples"):
        Classifier(samples=0)


def test_the_default_search_is_the_classifiers_and_the_plain_one_stays(hub):
    default, plain = Retriever(hub, embedder="hashing"), Retriever(hub, embedder="hashing", keys=())
    named = Retriever(hub, embedder="hashing", keys=("classifier",))
    found = default.candidates("8 + 8", k=2)
    assert found == named.candidates("8 + 8", k=2)
    assert found[0].evidence.startswith("classifier ")
    assert "classifier" not in plain.candidates("8 + 8", k=1)[0].evidence
    # a description alone, and more adapters than are classified, are searched for in the index
    assert default.for_task([], description="8 + 8") == plain.for_task([], description="8 + 8")
    assert default.candidates("8 + 8", k=51) == plain.candidates("8 + 8", k=51)
    assert default.for_examples([("cow", "COW")])[0].name == "upper"


def test_the_default_search_hears_the_description_beside_the_inputs(tmp_path):
    with Hub(tmp_path) as hub:
        for name, text in (("one", "write it in capitals"), ("two", "spell the letters")):
            add(hub, name, examples=["horse", "cat", "moon"], description=text)
        for text, best in (("in capitals", "one"), ("the letters", "two")):
            assert Retriever(hub, embedder="hashing").for_task(["dog"], description=text, k=1)[0].name == best


def test_probabilities_are_by_name_the_best_first(hub):
    retriever = Retriever(hub, embedder="hashing")
    found = retriever.probabilities(["8 + 8", "1 + 4"])
    assert next(iter(found)) == "sums"
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert sum(found.values()) == pytest.approx(1.0)
    assert list(retriever.probabilities([("cow", "COW")], k=1)) == ["upper"]
    with pytest.raises(RetrievalError, match="at least one input"):
        retriever.probabilities([])


def test_a_threshold_comes_from_the_hubs_own_samples(hub):
    retriever = Retriever(hub, embedder="hashing")
    found = retriever.calibrate(false_accept=0.2)
    assert (found.num_own, found.num_foreign) == (20, 20)
    key = Classifier()
    labels_N, own_NC, foreign_NC = key.held_out(hub.records(), retriever.space)
    assert np.isneginf(foreign_NC[np.arange(20), labels_N]).all()
    # refitted without the adapter, by the mixture that was chosen with it
    names = sorted(TASKS)
    fitted = key._fitted([hub.record(name) for name in names], retriever.space, outputs=False)
    own = fitted.mixed()
    for label in range(4):
        rest = labels_N != label
        targets = (labels_N[rest][:, None] == np.arange(4)).astype(float)
        alpha = np.linalg.solve(own[np.ix_(rest, rest)] + fitted.choice.ridge * np.eye(15), targets)
        norms = np.sqrt(np.diag(alpha.T @ own[np.ix_(rest, rest)] @ alpha))
        others = [other for other in range(4) if other != label]
        expected = (own[np.ix_(~rest, rest)] @ alpha)[:, others] / norms[others]
        np.testing.assert_allclose(foreign_NC[~rest][:, others], expected, atol=1e-7)
    assert found.accept == np.mean(own_NC.max(axis=1) >= found.threshold)
    assert found.false_accept == np.mean(foreign_NC.max(axis=1) >= found.threshold) <= 0.2
    assert retriever.candidates("Wie spät ist es, und wo ist der Bahnhof?") == []
    assert retriever.calibrate(inputs_per_query=5).num_own == 4


def test_a_threshold_without_inputs_needs_the_default_search_and_two_adapters(hub, tmp_path):
    with pytest.raises(RetrievalError, match=r"or neither and the default search: Retriever\(hub\)\.calibrate\(\)"):
        Retriever(hub, embedder="hashing", keys=("mean",)).calibrate()
    with pytest.raises(RetrievalError, match="needs own and foreign inputs"):
        Retriever(hub, embedder="hashing").calibrate(["8 + 8"])
    with Hub(tmp_path / "other") as other, pytest.raises(RetrievalError, match="two adapters, and there are 0"):
        Retriever(other, embedder="hashing").calibrate()


def test_a_threshold_of_a_plain_search_keeps_the_searches_plain(hub):
    plain = Retriever(hub, embedder="hashing", keys=())
    threshold = plain.calibrate(["8 + 8"], ["¿Qué hora es?"])
    again = Retriever(hub, embedder="hashing", abstention=threshold)
    assert again.candidates("8 + 8") == plain.candidates("8 + 8")
    other = Retriever(hub, embedder="hashing")
    other.abstention = threshold
    with pytest.raises(RetrievalError, match="keys classifier"):
        other.candidates("8 + 8")
