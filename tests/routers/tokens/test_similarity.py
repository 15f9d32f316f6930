"""Weights by the nearness of texts: the formulas written out, what the text of a row is, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from rounding import assert_near, num_terms

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.model import batches, scoring
from loraweave.errors import CompositionError, ScopeError, UnknownExpert, UnknownName, WeightingError
from loraweave.hub.embedders.hashing import Hashing
from loraweave.hub.pool import ExpertPool

EXAMPLES = {"a": ["red apple", "green apple"], "b": ["one two three", "four"], "c": ["paris in france"]}
TEXTS = ["an apple", "two and four", "is rome in france"]


def similarity(pool, **options):
    return lw.router("similarity", pool, **{"examples": EXAMPLES, "embedder": "hashing"} | options)


def cosines(texts, examples=EXAMPLES):
    """cos_NE, written out in numpy."""
    embed = Hashing().embed
    keys = [np.mean(embed(own).astype(np.float64), axis=0) for own in examples.values()]
    vectors = embed(texts).astype(np.float64)
    return np.array([[v @ k / np.linalg.norm(v) / np.linalg.norm(k) for k in keys] for v in vectors])


def softmax(scores_NE, temperature=0.05):
    powers = np.exp((scores_NE - scores_NE.max(axis=1, keepdims=True)) / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def encoded(tokenizer, texts):
    batch = batches.pad_rows(tokenizer, tokenizer(list(texts))["input_ids"])
    return dict(zip(("input_ids", "attention_mask"), batch, strict=True))


def used(engine, layer="model.layers.0.self_attn.q_proj"):
    return engine.last_weights[layer]


def test_each_row_has_the_softmax_of_its_cosines_over_the_temperature(engine, model, pool, tokenizer):
    with torch.no_grad(), engine.activate(similarity(pool, temperature=0.07)):
        model(**encoded(tokenizer, TEXTS))
    layer = next(name for name in pool.layer_names if all(name in a.layers for a in pool.adapters.values()))
    expected = softmax(cosines(TEXTS), 0.07)
    assert np.allclose(used(engine, layer)[:, 0].numpy(), expected, atol=1e-6)
    assert np.allclose(expected.sum(axis=1), 1)


def test_selection_is_the_nearest_adapter_alone_also_in_layers_that_it_leaves_alone(engine, model, pool, tokenizer):
    inputs = encoded(tokenizer, TEXTS)
    nearest = cosines(TEXTS).argmax(axis=1)
    with torch.no_grad():
        with engine.activate(similarity(pool, form="selection")):
            found = model(**inputs).logits
        with engine.activate([{pool.names[place]: 1.0} for place in nearest]):
            expected = model(**inputs).logits
    assert len(set(nearest)) > 1
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_mixture_has_one_kth_for_each_of_the_k_nearest(pool):
    order = cosines(TEXTS).argsort(axis=1)[:, ::-1]
    expected = np.zeros((3, 3))
    np.put_along_axis(expected, order[:, :2], 0.5, axis=1)
    assert np.allclose(similarity(pool, form="mixture", nearest=2).of_texts(TEXTS).numpy(), expected)
    assert np.allclose(similarity(pool, form="mixture").of_texts(TEXTS).numpy(), 1 / 3)


def test_a_low_temperature_chooses_the_nearest_and_equal_keys_weigh_the_same(pool):
    nearest = similarity(pool, temperature=1e-6).of_texts(TEXTS)
    assert torch.equal(nearest, torch.eye(3)[torch.from_numpy(cosines(TEXTS).argmax(axis=1))])
    same = similarity(pool, examples={name: ["the same"] for name in "abc"})
    assert torch.allclose(same.of_texts(TEXTS), torch.full((3, 3), 1 / 3))


def test_samples_of_cards_are_keys_as_prompts_with_their_description(pool):
    cards = {"a": ("Name a fruit.", ["red"]), "b": ("Count.", ["one", "two"]), "c": ("", ["rome"])}
    shown = ExpertPool(
        [
            replace(pool[name], card={"description": description, "examples": examples})
            for name, (description, examples) in cards.items()
        ]
    )
    made = {n: [f"{d}\nInput: {text}\nOutput:" for text in examples] for n, (d, examples) in cards.items()}
    bare = {n: examples for n, (_, examples) in cards.items()}
    for template, expected in (({}, made), ({"template": None}, bare)):
        found = lw.router("similarity", shown, embedder="hashing", **template).of_texts(TEXTS)
        assert np.allclose(found.numpy(), softmax(cosines(TEXTS, expected)), atol=1e-6)


def test_samples_of_a_hubs_records_are_keys_too(pool, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        for name, examples in EXAMPLES.items():
            hub.add(pool[name], name=name, examples=examples)
        found = similarity(pool, examples=hub, template=None).of_texts(TEXTS)
    assert torch.equal(found, similarity(pool).of_texts(TEXTS))


@pytest.mark.parametrize(
    "settings", [{}, {"use_cache": False}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_generation_has_the_weights_of_the_prompts_to_its_end(engine, pool, settings):
    w_NE = softmax(cosines(TEXTS))
    mixture = [dict(zip(pool.names, map(float, row), strict=True)) for row in w_NE]
    arguments = {"max_new_tokens": 8, "do_sample": False, **settings}
    expected = engine.generate(TEXTS, mixture=mixture, **arguments)
    assert engine.generate(TEXTS, mixture=similarity(pool), **arguments) == expected


def test_an_encoder_decoder_generates_with_the_weights_of_its_input(make_model, make_adapters, tokenizer):
    model = make_model("t5")
    pool = ExpertPool(make_adapters(model, "t5"))
    engine = Composer(model, pool, tokenizer=tokenizer)
    mixture = [dict(zip(pool.names, map(float, row), strict=True)) for row in softmax(cosines(TEXTS))]
    expected = engine.generate(TEXTS, mixture=mixture, max_new_tokens=6)
    assert engine.generate(TEXTS, mixture=similarity(pool), max_new_tokens=6) == expected


def test_a_row_of_a_batch_has_what_it_has_alone(engine, model, pool, tokenizer):
    router = similarity(pool)
    with torch.no_grad(), engine.activate(router):
        together = model(**encoded(tokenizer, TEXTS)).logits
        for row, text in enumerate(TEXTS):
            alone = model(**encoded(tokenizer, [text])).logits[0]
            positions = scoring.with_positions(model, *encoded(tokenizer, TEXTS).values())
            assert_near(model(**positions).logits[row, -len(alone) :], alone, num_terms(model))
    assert together.shape[0] == 3


def test_losses_and_labels_are_weighed_by_the_prompt_without_the_answer(engine, model, pool, tokenizer):
    task = lw.Task([("an apple", "fruit"), ("two and four", "six")], labels=["fruit", "six"], template="{input}")
    mixture = [dict(zip(pool.names, map(float, row), strict=True)) for row in softmax(cosines(TEXTS[:2]))]
    found, expected = [], []
    for values, given in ((found, similarity(pool)), (expected, None)):
        for row, example in enumerate(task.examples):
            with engine.activate(given or mixture[row]):
                values += scoring.losses(model, tokenizer, task, [example])
                inputs = encoded(tokenizer, [task.prompt(example[0])])
                labels = scoring.label_ids(tokenizer, task.labels)
                with torch.no_grad():
                    values += scoring.label_losses(model, *inputs.values(), [labels])[0].tolist()
    assert found == pytest.approx(expected, abs=1e-5)


def test_saved_it_has_neither_examples_nor_another_embedder(pool, tmp_path, tiny_encoder):
    made = similarity(pool, embedder=str(tiny_encoder), temperature=0.5, form="softmax")
    made.save_pretrained(tmp_path / "router")
    again = lw.router(tmp_path / "router")
    assert torch.equal(again.of_texts(TEXTS), made.of_texts(TEXTS))
    assert "apple" not in (tmp_path / "router" / "router.json").read_text()


def test_an_embedder_that_has_changed_since_is_refused(pool, tmp_path, tiny_encoder):
    import shutil

    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    similarity(pool, embedder=str(folder)).save_pretrained(tmp_path / "router")
    text = (folder / "encoder.json").read_text()
    (folder / "encoder.json").write_text(text.replace("task: ", "another: "))
    with pytest.raises(WeightingError, match="make the router again"):
        lw.router(tmp_path / "router").of_texts(["x"])


def test_an_expert_joins_with_the_samples_of_its_card(pool, model, make_adapter):
    new = replace(make_adapter(model, "new"), card={"examples": ["seven eight"]})
    more = similarity(pool, template=None).add_expert("new", new)
    expected = softmax(cosines(TEXTS, EXAMPLES | {"new": ["seven eight"]}))
    assert np.allclose(more.of_texts(TEXTS).numpy(), expected, atol=1e-6)


def test_the_models_generate_is_its_own_again_and_a_copy_has_its_own(engine, model, pool, tokenizer):
    inputs = encoded(tokenizer, TEXTS)
    settings = {"max_new_tokens": 4, "do_sample": False}
    base = model.generate(**inputs, **settings)
    with engine.activate(similarity(pool)):
        assert "generate" in vars(model)
        copied = copy.deepcopy(model)
    assert "generate" not in vars(model)
    assert torch.equal(copied.generate(**inputs, **settings), base)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embedder": "hasing"}, UnknownName, "did you mean 'hashing'"),
        ({"examples": {"a": ["x"], "b": []}}, WeightingError, "has none of 'b', 'c'"),
        ({"examples": None}, WeightingError, "has none of 'a', 'b', 'c'"),
        ({"examples": EXAMPLES | {"d": ["x"]}}, UnknownExpert, "no expert 'd'"),
        ({"examples": EXAMPLES | {"a": ["x", " "]}}, WeightingError, "an example of 'a'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(pool, options, error, message):
    with pytest.raises(error, match=message):
        similarity(pool, **options)


def test_a_composer_without_a_tokenizer_is_refused_before_anything_runs(model, pool):
    with pytest.raises(CompositionError, match="tokenizer="):
        Composer(model, pool).activate(similarity(pool))


def test_a_call_without_text_is_refused_by_name(engine, model, pool, tokenizer):
    embeds = model.get_input_embeddings()(encoded(tokenizer, TEXTS)["input_ids"])
    with engine.activate(similarity(pool)), pytest.raises(ScopeError, match="has no input_ids"):
        model(inputs_embeds=embeds)


def test_a_copy_of_a_router_that_was_in_use_gives_the_same(engine, pool):
    router = similarity(pool, per="token")
    engine.generate(TEXTS, mixture=router, max_new_tokens=2)
    assert torch.equal(copy.deepcopy(router).of_texts(TEXTS), router.of_texts(TEXTS))
