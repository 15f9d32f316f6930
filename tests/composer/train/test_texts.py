"""Continued pre-training: every token of a stream of texts is predicted once, from what another training left."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.model.scoring import losses_of_rows
from loraweave.composer.train.rows import Texts
from loraweave.errors import InvalidTask, TrainingError

STREAM = ["a b c d", "c d e f a b", "b c d e"] * 3
TRAINED = {"rank": 3, "steps": 20, "lr": 2e-2, "batch_size": 4, "progress": False}


def test_each_token_but_the_first_is_predicted_once_from_those_before_it_in_its_row(tiny_llama, tokenizer):
    rows = Texts(["a b c", "d e", "f"], length=4).rows(tiny_llama, tokenizer)
    end = tokenizer.eos_token_id
    ids = [
        token for text in ("a b c", "d e", "f") for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    ]
    assert [row.prompt[0] for row in rows] == ids[:-1:3]
    assert [token for row in rows for token in row.target] == ids[1:]
    assert max(map(len, rows)) == 4
    (whole,) = Texts(["a b c", "d e", "f"], length=64).rows(tiny_llama, tokenizer)
    expected = tiny_llama(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert losses_of_rows(tiny_llama, tokenizer, [whole])[0] == pytest.approx(expected.item(), rel=1e-6)


def test_it_goes_on_from_a_composition_and_keeps_its_layers(tiny_llama, tokenizer, make_adapters):
    parents = make_adapters(tiny_llama, "llama")
    merged = lw.merge(parents, [0.5, 0.5, 0.5])
    held_out = Texts(["d e f a b c d"], length=64)
    found = lw.train_adapters(
        tiny_llama,
        tokenizer,
        {"stream": Texts(STREAM, length=8)},
        start={"stream": merged},
        held_out={"stream": held_out},
        **TRAINED,
    )
    report = found.report.jobs["stream"]
    assert found["stream"].card["recipe"]["start"]["hash"] == merged.hash
    assert list(found["stream"].layers) == list(merged.layers)
    losses = dict(report.held_out)
    assert min(losses.values()) < losses[0]
    with Composer(tiny_llama, [found["stream"]]).activate({"stream": 1.0}):
        (loss,) = losses_of_rows(tiny_llama, tokenizer, held_out.rows(tiny_llama, tokenizer))
    assert loss == pytest.approx(min(losses.values()), rel=1e-4)


def test_a_checkpoint_knows_the_texts(tiny_llama, tokenizer, tmp_path):
    def train(texts):
        return lw.train_adapters(tiny_llama, tokenizer, {"one": texts}, checkpoint=tmp_path, **{**TRAINED, "steps": 2})[
            "one"
        ]

    first = train(Texts(["a b c"]))
    assert train(Texts(["a b d"])).hash != first.hash == train(Texts(["a b c"])).hash


def test_texts_stand_beside_tasks_of_one_adapter(tiny_llama, tokenizer):
    both = [Texts(["a b c"]), lw.Task([("d", "e")])]
    one = lw.train_adapters(tiny_llama, tokenizer, {"one": both}, **TRAINED)["one"]
    alone = lw.train_adapters(tiny_llama, tokenizer, {"one": both[0]}, **TRAINED)["one"]
    assert one.hash != alone.hash


def test_what_is_no_stream_of_texts_is_refused(tiny_t5, tiny_llama, tokenizer):
    with pytest.raises(InvalidTask, match="texts are 'a b'; give a list of texts"):
        Texts("a b")
    with pytest.raises(InvalidTask, match="not all empty"):
        Texts(["", " "])
    with pytest.raises(InvalidTask, match="length is 1; a row has 2 tokens or more"):
        Texts(["a"], length=1)
    with pytest.raises(InvalidTask, match="but the model's context is"):
        lw.train_adapters(tiny_llama, tokenizer, {"one": Texts(["a b"], length=10**6)}, **TRAINED)
    with pytest.raises(InvalidTask, match="an encoder-decoder reads one text and writes another"):
        lw.train_adapters(tiny_t5, tokenizer, {"one": Texts(["a b"])}, target_modules=["q", "v"], **TRAINED)
    with pytest.raises(TrainingError, match="task 'one' has no examples"):
        lw.train_adapters(tiny_llama, tokenizer, {"one": []}, **TRAINED)
