from __future__ import annotations

import numpy as np

from loraweave.hub.embedders.form import Form


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
