"""Rows of one running batch, each beside the row alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from served_rows import MIXTURES, PROMPTS, alone, finish, heard_rows, join, make_batch, served
from served_rows import Heard as HeardRow

import loraweave as lw
from loraweave.errors import CompositionError
from loraweave.serving.batch import Sampling, Stops, choose
from loraweave.serving.memory import Experts

GREEDY = Sampling(9, temperature=0.0, logprobs=2)


@pytest.fixture(params=["llama", "gpt2"])
def setting(request, make_model, make_adapters, tokenizer):
    """(engine, adapters) in float64, where no rounding hides a difference."""
    model = make_model(request.param, dtype=torch.float64)
    adapters = make_adapters(model, request.param)
    return lw.Composer(model, adapters, tokenizer=tokenizer), adapters


def require_each_alone(engine, heard):
    for each, prompt, weights in zip(heard, PROMPTS, MIXTURES, strict=True):
        text, logprobs = alone(engine, prompt, weights)
        assert each.text == text
        assert each.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert len(each.logprobs) == len(logprobs)


@pytest.fixture
def heard(setting, tokenizer):
    return heard_rows(tokenizer, setting[1])


def test_rows_that_begin_together_answer_as_alone(setting, tokenizer, heard):
    batch, experts = make_batch(setting[0].model, tokenizer)
    join(batch, experts, heard)
    finish(batch)
    require_each_alone(setting[0], heard)
    assert any(each.finish == "length" for each in heard)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [1, 0, 3, 2, 4], [4, 3, 2, 1, 0]])
def test_rows_that_join_at_later_steps_answer_as_alone(setting, tokenizer, heard, order):
    batch, experts = make_batch(setting[0].model, tokenizer)
    for place in order:
        join(batch, experts, [heard[place]])
        if batch.rows:
            batch.step()
    finish(batch)
    require_each_alone(setting[0], heard)


def test_a_row_that_leaves_midway_changes_nothing_for_the_others(setting, tokenizer, heard):
    batch, experts = make_batch(setting[0].model, tokenizer)
    longest = HeardRow(tokenizer, "a" * 30, served(setting[1], {"b": 1.0}), Sampling(50, temperature=0.0))
    join(batch, experts, [longest, *heard[:3]])
    batch.step()
    batch.step()
    longest.row.over = True
    batch.drop_ended()
    # its columns went with it
    assert batch._mask_BW.shape[1] <= max(map(len, PROMPTS)) + 3
    join(batch, experts, heard[3:])
    finish(batch)
    require_each_alone(setting[0], heard)


def test_a_cache_has_a_column_for_each_token_read(setting, tokenizer, heard):
    batch, experts = make_batch(setting[0].model, tokenizer)
    join(batch, experts, heard[:2])
    batch.step()
    join(batch, experts, heard[2:])
    counts = [len(row.ids[0]) - 1 for row in batch.rows]
    assert batch._mask_BW.sum(dim=1).tolist() == counts
    assert all(layer.keys.shape[-2] == batch._mask_BW.shape[1] == max(counts) for layer in batch._cache.layers)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_seeded_row_draws_what_it_draws_alone(setting, tokenizer, top_p):
    engine, adapters = setting
    batch, experts = make_batch(engine.model, tokenizer)
    sampling = [Sampling(9, temperature=0.8, top_p=top_p, seed=seed) for seed in range(5)]
    rows = [
        HeardRow(tokenizer, prompt, served(adapters, weights), each)
        for prompt, weights, each in zip(PROMPTS, MIXTURES, sampling, strict=True)
    ]
    join(batch, experts, rows[:3])
    batch.step()
    join(batch, experts, rows[3:])
    finish(batch)
    drawn = [
        engine.generate(
            [prompt], mixture=weights, seeds=[seed], do_sample=True, temperature=0.8, top_p=top_p, top_k=0, max_new_tokens=9
        )[0]
        for seed, (prompt, weights) in enumerate(zip(PROMPTS, MIXTURES, strict=True))
    ]
    assert [row.text for row in rows] == drawn


# the adapter c of the other model is before a norm, which makes anything finite again
@pytest.mark.parametrize("setting", ["llama"], indirect=True)
def test_a_row_whose_logits_are_not_finite_ends_alone(setting, tokenizer, heard):
    batch, experts = make_batch(setting[0].model, tokenizer)
    huge = HeardRow(tokenizer, "ab", served(setting[1], {"c": 3e38}), Sampling(5, temperature=0.0))
    join(batch, experts, [*heard[:2], huge, *heard[2:]])
    assert huge.row.over
    assert isinstance(huge.error, CompositionError)
    finish(batch)
    require_each_alone(setting[0], heard)


def test_experts_that_no_row_uses_make_room(setting, tokenizer):
    engine, adapters = setting
    _, experts = make_batch(engine.model, tokenizer, most=1)
    each = {adapter.name: served(adapters, {adapter.name: 1.0}) for adapter in adapters}
    of = {adapter.name: adapter.hash for adapter in adapters}
    for name in "abc":
        experts.take(each[name])
    experts.give_back(each["a"])
    assert experts.loaded == (of["a"], of["b"], of["c"])
    experts.give_back(each["c"])
    # the one used longest ago goes, and b is still in use
    assert experts.loaded == (of["b"], of["c"])
    experts.take(each["a"])
    experts.give_back(each["b"])
    assert experts.loaded == (of["c"], of["a"])


def test_what_is_loaded_is_in_the_engine_whoever_loads_and_makes_room_meanwhile(setting, tokenizer):
    engine, adapters = setting
    experts = Experts(engine.model, tokenizer, most=1)
    compositions = [served(adapters, {name: 1.0}) for name in "abc"]
    over = threading.Event()

    def load():
        while not over.is_set():
            for composition in compositions:
                experts.load(composition)

    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load)
        try:
            for number in range(60):
                composition = compositions[number % 3]
                experts.take(composition)
                with experts.activate([composition]):
                    pass
                experts.give_back(composition)
        finally:
            over.set()
        loading.result()
    experts.take(compositions[0])
    assert set(experts.loaded) == set(experts._engine.pool.names)


def test_an_encoder_decoder_and_a_sliding_window_are_refused(make_model, tokenizer):
    with pytest.raises(CompositionError, match="cannot serve a T5ForConditionalGeneration"):
        make_batch(make_model("t5"), tokenizer)
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    window = MistralForCausalLM(MistralConfig(vocab_size=61, num_key_value_heads=2, sliding_window=4, **sizes)).eval()
    batch, experts = make_batch(window, tokenizer)
    row = HeardRow(tokenizer, "abc", served([], {}), Sampling(3, temperature=0.0))
    with pytest.raises(CompositionError, match="cannot serve a MistralForCausalLM"):
        join(batch, experts, [row])


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
    told += "" if found else stopping.rest
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
