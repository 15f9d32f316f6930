from __future__ import annotations

import threading
import zlib

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits

from loraweave.hub.embedders._embedder import embed_in_batches
from loraweave.hub.embedders.form import Form
from loraweave.hub.embedders.hashing import Hashing


def cosine(left, right):
    rows = Form().embed([left, right]).astype(np.float64)
    return float(rows[0] @ rows[1])


def test_texts_of_one_form_are_nearer_than_texts_of_one_subject():
    assert cosine("horse", "table") > cosine("horse", "The horse ran over the table.")
    assert cosine("apple, run, green", "dog, sit, blue") > cosine("apple, run, green", "apple")
    assert cosine("12 30", "7 81") > cosine("12 30", "twelve thirty")


def test_words_of_one_length_and_case_have_one_form():
    assert abs(cosine("horse", "table") - 1.0) < 1e-6


def test_every_mark_counts():
    plain = Form().embed(["a b c"])[0]
    for mark in ",.?!:;\"'-([@#/=\n":
        assert np.abs(Form().embed([f"a{mark} b c"])[0] - plain).max() > 0.01, mark


def test_a_single_letter_is_its_three_n_grams_written_out():
    # " x " has the n-grams " x", "x " and " x ", each once
    row = np.zeros(32)
    for gram in (b" x", b"x ", b" x "):
        code = zlib.crc32(gram)
        row[(code // 2) % 32] += 1 if code % 2 else -1
    np.testing.assert_allclose(Hashing(dim=32).embed(["x"])[0], row / np.linalg.norm(row), atol=1e-7)


def test_a_repeated_word_counts_by_one_plus_log():
    # both texts have the same n-grams in the same proportion, so the direction stays
    once, thrice = Hashing().embed(["word", "word word word"])
    np.testing.assert_allclose(once, thrice, atol=1e-6)


def test_case_and_unicode_form_do_not_count():
    rows = Hashing().embed(["Caf\u00e9", "cafe\u0301", "CAF\u00c9"])
    assert rows[0].tobytes() == rows[1].tobytes() == rows[2].tobytes()


def test_texts_of_like_spelling_are_nearer_than_others():
    query, near, far = Hashing().embed(["translate the word", "translating words", "12 plus 30"])
    assert query @ near > query @ far + 0.2


def test_n_grams_that_cancel_still_give_a_unit_vector():
    rows = Hashing(dim=1).embed(["x", "xy", "xyz", "ab"])
    np.testing.assert_array_equal(np.abs(rows), 1.0)


def test_the_id_tells_dimensions_apart():
    assert Hashing(dim=8).id != Hashing(dim=16).id


def test_batches_run_beside_each_other_while_blas_has_one_thread():
    both = threading.Barrier(2)

    def encode(texts):
        # broken, were the batches to run one after the other
        both.wait(timeout=60)
        seen.update(library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info())
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)

    seen = set()
    with threadpool_limits(2, user_api="blas"):
        rows_ND = embed_in_batches(["ccc", "a", "bb", "a", "dddd"], encode, 2, 2)
    assert rows_ND.tolist() == [[3, 99], [1, 97], [2, 98], [1, 97], [4, 100]]
    assert seen == {1}


def test_no_text_has_no_row():
    assert embed_in_batches([], lambda texts: np.zeros((len(texts), 3)), 3, 2).shape == (0, 3)
