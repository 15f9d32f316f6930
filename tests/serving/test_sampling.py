"""Stop strings, beside the whole text cut where the first of them is complete."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraweave.serving.sampling import Sampling, Stops, choose


def cut(pieces, stops):
    """The text up to a stop string, when the pieces are looked at one by one."""
    text = ""
    for piece in pieces:
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], True
    return text, False


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_told_is_the_text_before_the_first_stop_string(pieces, stops):
    found, stopping, told = False, Stops(stops), ""
    for piece in pieces:
        new, found = stopping.add(piece)
        told += new
        if found:
            break
    told += "" if found else stopping.rest()
    assert (told, found) == cut(pieces, stops)


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_a_temperature_of_about_zero_takes_the_likeliest_token(temperature):
    logits_V = torch.tensor([0.1, 3.0, 2.9])
    assert choose(logits_V, Sampling(1, temperature=temperature), torch.Generator()).token == 1


def test_log_probabilities_are_those_before_temperature_and_finite():
    logits_V = torch.tensor([1.0, 2.0, -torch.inf])
    chosen = choose(logits_V, Sampling(1, temperature=0.5, top_p=0.1, logprobs=3), torch.Generator())
    # e / (e + e^2), as a logarithm
    first = -torch.log1p(torch.tensor(1.0).exp()).item()
    assert chosen.token == 1
    assert chosen.logprob == pytest.approx(first + 1)
    assert [token for token, _ in chosen.top] == [1, 0, 2]
    assert [value for _, value in chosen.top] == pytest.approx([first + 1, first, -9999.0])
