"""The page on explanations says what its picture shows."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_page_on_explanations_says_what_its_picture_shows(run_page, tmp_path):
    names = run_page("docs/extensions/explain.md")
    explanation = names["explanation"]
    assert explanation.w_TLE.shape == (21, 60, 20)
    assert (tmp_path / "weights.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "weights.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(names["effects"]) == list(explanation.experts)
    strongest = {
        token.strip(): explanation.experts[int(w_E.argmax())]
        for token, w_E in zip(explanation.tokens, explanation.by_token_TE, strict=True)
    }
    assert (strongest["seventeen"], strongest["German"]) == ("number_words", "translate_en_de")
    shares = dict(zip(names["used"].experts, names["load"].share_E.tolist(), strict=True))
    assert sum(shares.values()) == pytest.approx(1)
    assert {layer.num_tokens for layer in names["trace"].weights.layers.values()} <= set(range(5, 12))
