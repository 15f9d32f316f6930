"""Weights for each token by what stands before it: the formula, and what a cache changes, which is nothing."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from rounding import assert_near, num_terms

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.model import batches, scoring
from loraweave.errors import ScopeError
from loraweave.hub.embedders.hashing import Hashing
from loraweave.hub.pool import ExpertPool

EXAMPLES = {"a": ["red apple", "green apple"], "b": ["one two three", "four"], "c": ["paris in france"]}
TEXTS = ["an apple", "two and four", "is rome in france"]


@pytest.fixture
def layer(pool):
    """One that all experts update, whose weights are therefore all there."""
    return next(name for name in pool.layer_names if all(name in a.layers for a in pool.adapters.values()))


@pytest.fixture
def cache_name(model):
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def by_token(pool, **options):
    settings = {"examples": EXAMPLES, "embedder": "hashing", "per": "token", "temperature": 0.05}
    return lw.router("similarity", pool, **settings | options)


def weights_of(text):
    """softmax(cos / 0.05) of one text, written out."""
    embed = Hashing().embed
    means = [embed(own).astype(np.float64).mean(axis=0) for own in EXAMPLES.values()]
    powers = [math.exp(embed([text])[0] @ mean / np.linalg.norm(mean) / 0.05) for mean in means]
    return np.array(powers) / sum(powers)


def encoded(tokenizer, texts):
    ids_BT, mask_BT = batches.pad_rows(tokenizer, tokenizer(list(texts))["input_ids"])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(dim=1) - 1).clamp(min=0)}


@pytest.mark.parametrize("refresh", [1, 2, 5])
def test_in_a_plain_call_a_token_has_the_weights_of_the_text_up_to_the_last_refresh(
    engine, model, pool, tokenizer, layer, refresh
):
    inputs = encoded(tokenizer, TEXTS)
    with torch.no_grad(), engine.activate(by_token(pool, refresh=refresh)):
        model(**inputs)
    w_BTE = engine.last_weights[layer]
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        for number in range(1, len(ids) + 1):
            known = max(number // refresh * refresh, 1)
            expected = weights_of(tokenizer.decode(ids[:known], skip_special_tokens=True))
            assert np.allclose(w_BTE[row, -len(ids) + number - 1].numpy(), expected, atol=1e-5)
    assert not bool(w_BTE[inputs["attention_mask"] == 0].any())


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_while_generating_the_prompt_has_its_own_weights_and_they_are_made_anew_at_every_refresh(
    engine, model, pool, tokenizer, layer, refresh
):
    ids = tokenizer(TEXTS[0])["input_ids"]
    router = by_token(pool, refresh=refresh)
    with torch.no_grad(), engine.activate(router), engine.record() as trace:
        output = model.generate(torch.tensor([ids]), max_new_tokens=7, min_new_tokens=7, do_sample=False)[0].tolist()
    w_TE = torch.cat([call.w_BTE[0].expand(1 if i else len(ids), 3) for i, call in enumerate(trace.calls(layer))])
    assert len(w_TE) == len(output) - 1
    for place in range(len(w_TE)):
        num_generated = max(place + 1 - len(ids), 0)
        context = output[: len(ids) + num_generated // refresh * refresh]
        expected = weights_of(tokenizer.decode(context, skip_special_tokens=True))
        assert np.allclose(w_TE[place].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("refresh", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_cached_generation_is_generation_without_a_cache(engine, pool, refresh, settings):
    router = by_token(pool, refresh=refresh)
    arguments = {"mixture": router, "max_new_tokens": 9, "do_sample": False, **settings}
    assert engine.generate(TEXTS, use_cache=True, **arguments) == engine.generate(TEXTS, use_cache=False, **arguments)


def test_sampling_under_seeds_is_the_same_with_and_without_a_cache(engine, pool):
    arguments = {"mixture": by_token(pool), "max_new_tokens": 9, "do_sample": True, "seeds": [1, 2, 3]}
    assert engine.generate(TEXTS, use_cache=True, **arguments) == engine.generate(TEXTS, use_cache=False, **arguments)


@pytest.mark.parametrize("per", ["token", "row"])
def test_a_callers_own_loop_over_a_cache_gives_what_one_call_gives(engine, model, pool, tokenizer, cache_name, per):
    from transformers import DynamicCache

    inputs = encoded(tokenizer, TEXTS)
    num_tokens = inputs["input_ids"].shape[1]
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad(), engine.activate(by_token(pool, per=per, refresh=2)):
        # the first call is the prompt of weights per row
        for begin, end in ((0, num_tokens - 5), (num_tokens - 5, num_tokens - 4), (num_tokens - 4, num_tokens)):
            step = {
                "input_ids": inputs["input_ids"][:, begin:end],
                "attention_mask": inputs["attention_mask"][:, :end],
                "position_ids": inputs["position_ids"][:, begin:end],
            }
            parts.append(model(**step, **{cache_name: cache}, use_cache=True).logits)
        found = torch.cat(parts, dim=1)
        if per == "token":
            expected = model(**inputs).logits
    if per == "row":
        first = [
            tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
            for ids, mask in zip(inputs["input_ids"][:, :-5], inputs["attention_mask"][:, :-5], strict=True)
        ]
        mixture = [dict(zip(pool.names, weights_of(text).tolist(), strict=True)) for text in first]
        with torch.no_grad(), engine.activate(mixture):
            expected = model(**inputs).logits
    real_BT = inputs["attention_mask"].bool()
    assert_near(found[real_BT], expected[real_BT], num_terms(model))


def test_a_cache_that_another_mixture_filled_is_refused_by_name(engine, model, pool, tokenizer, cache_name):
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids_BT = torch.tensor([tokenizer("an apple")["input_ids"]])
    with torch.no_grad():
        model(ids_BT, **{cache_name: cache}, use_cache=True)
        with engine.activate(by_token(pool)), pytest.raises(ScopeError, match="every token of a cache"):
            model(ids_BT, **{cache_name: cache}, use_cache=True)


def test_labels_are_ranked_with_the_weights_of_the_text_that_they_end(engine, model, pool, tokenizer):
    labels = ["six", "fruit"]
    ids = scoring.label_ids(tokenizer, labels)
    inputs = scoring.pad_prompts(model, tokenizer, TEXTS)
    router = by_token(pool, refresh=1)
    with torch.no_grad(), engine.activate(router):
        found = scoring.label_losses(model, inputs["input_ids"], inputs["attention_mask"], [ids])
        pairs = [(text, label) for text in TEXTS for label in labels]
        rows = scoring.losses(model, tokenizer, lw.Task([], template="{input}"), pairs)
    lengths = torch.tensor([len(ids[place]) for _ in TEXTS for place in range(2)])
    assert torch.allclose(found.flatten(), torch.tensor(rows) * lengths, atol=1e-4)


def test_an_encoder_decoder_is_refused_by_name(make_model, make_adapters, tokenizer):
    model = make_model("t5")
    pool = ExpertPool(make_adapters(model, "t5"))
    with pytest.raises(ScopeError, match="per='row'"):
        Composer(model, pool, tokenizer=tokenizer).generate(TEXTS, mixture=by_token(pool), max_new_tokens=3)


def test_a_mask_that_does_not_say_which_tokens_are_real_is_refused(engine, model, pool):
    with engine.activate(by_token(pool)), pytest.raises(ScopeError, match="give a mask of that shape"):
        model(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 1, 3, 3))


def test_threads_that_generate_at_once_under_one_router_have_their_own_texts(engine, model, pool, tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    router = by_token(pool, refresh=1)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

    def answer(text):
        return engine.generate([text], mixture=router, **settings)

    alone = [answer(text) for text in TEXTS]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(answer, TEXTS)) == alone


@pytest.mark.parametrize("per", ["row", "token"])
def test_a_stream_is_what_generate_gives(engine, pool, per):
    router = by_token(pool, per=per)
    settings = {"mixture": router, "max_new_tokens": 9, "do_sample": False}
    pieces = list(engine.stream(TEXTS, **settings))
    assert ["".join(own) for own in zip(*pieces, strict=True)] == engine.generate(TEXTS, **settings)


@pytest.mark.parametrize("per", ["row", "token"])
def test_tokens_that_are_looked_up_and_taken_back_change_nothing(engine, pool, per):
    settings = {"mixture": by_token(pool, per=per, refresh=1), "max_new_tokens": 12, "do_sample": False}
    text = "one two one two one two one"
    assert engine.generate([text], prompt_lookup_num_tokens=3, **settings) == engine.generate([text], **settings)


@pytest.mark.parametrize("per", ["row", "token"])
def test_inference_mode_changes_nothing(engine, pool, per):
    settings = {"mixture": by_token(pool, per=per), "max_new_tokens": 6, "do_sample": False}
    with torch.inference_mode():
        found = engine.generate(TEXTS, **settings)
    assert engine.generate(TEXTS, **settings) == found


@pytest.mark.parametrize("per", ["row", "token"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_rows_of_a_batch_can_have_it_beside_other_mixtures(engine, pool, per, settings):
    router = by_token(pool, per=per)
    arguments = {"max_new_tokens": 8, "do_sample": False, **settings}
    found = engine.generate(TEXTS, mixture=[router, {"b": 0.5}, None], **arguments)
    mixtures = (router, {"b": 0.5}, {})
    assert found == [engine.generate([t], mixture=m, **arguments)[0] for t, m in zip(TEXTS, mixtures, strict=True)]
