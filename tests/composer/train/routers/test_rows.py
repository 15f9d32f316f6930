"""What data a router is trained on, and what is refused by name."""

from __future__ import annotations

import pytest

from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import IGNORED
from loraweave.composer.train.rows import Owners, RowReader
from loraweave.errors import InvalidTask, UnknownExpert
from loraweave.types import Task


@pytest.fixture
def read(gates, pool, model, tokenizer):
    return RowReader(Owners.of(gates(pool)), model, tokenizer).read


@pytest.fixture
def read_apart(apart, pool, model, tokenizer):
    return RowReader(Owners.of(apart(pool)), model, tokenizer).read


def texts(rows, tokenizer):
    return [(tokenizer.decode(row.prompt), tokenizer.decode(row.target)) for row in rows]


def test_pairs_are_inputs_and_targets(read, tokenizer):
    rows = read([("cat", "cats"), ["dog", "dogs"]])
    assert texts(rows, tokenizer) == [("\nInput: cat\nOutput:", " cats</s>"), ("\nInput: dog\nOutput:", " dogs</s>")]
    assert [(row.expert, row.number, row.num_targets) for row in rows] == [(-1, 0, 6), (-1, 1, 6)]


def test_a_mapping_names_experts_or_tasks_and_its_tasks_have_their_own_prompts(read, tokenizer):
    task = Task([("cat", "cats")], instruction="Plural", template="{instruction} of {input}:")
    rows = read({"b": task, "other": [("x", "y")]})
    assert texts(rows, tokenizer) == [("Plural of cat:", " cats</s>"), ("\nInput: x\nOutput:", " y</s>")]
    assert [row.expert for row in rows] == [1, -1]


def test_answers_after_demonstrations_end_with_the_line(read, tokenizer):
    shown = Task([("cat", "cats"), ("dog", "dogs")], template="{input}:", demonstrations=True)
    rows = read({"b": shown, "other": [("x", "y")]})
    assert texts(rows, tokenizer) == [
        ("dog: dogs\n\ncat:", " cats\n"),
        ("cat: cats\n\ndog:", " dogs\n"),
        ("\nInput: x\nOutput:", " y</s>"),
    ]


def test_rows_as_mappings_say_whose_they_are(read, tokenizer):
    rows = read(
        [
            {"input": "cat", "target": "cats", "instruction": "Plural", "expert": "c"},
            {"prompt": "a cat is", "target": "nice"},
            {"input": "x", "target": "y", "expert": None},
        ]
    )
    assert texts(rows, tokenizer) == [
        ("Plural\nInput: cat\nOutput:", " cats</s>"),
        ("a cat is", " nice</s>"),
        ("\nInput: x\nOutput:", " y</s>"),
    ]
    assert [row.expert for row in rows] == [2, -1, -1]


def test_any_iterable_of_rows_will_do(read):
    class Columns:
        """Like datasets.Dataset: no list, but it gives a mapping for each row."""

        column_names = ("input", "target")

        def __iter__(self):
            return iter([{"input": "a", "target": "b"}, {"input": "c", "target": "d"}])

    assert len(read(Columns())) == 2
    assert len(read(pair for pair in [("a", "b")])) == 1


def test_rows_of_token_ids_have_loss_where_their_labels_are(read):
    row = {"input_ids": [4, 5, 6, 7, 8], "labels": [IGNORED, IGNORED, 6, IGNORED, 8]}
    (found,) = read([row])
    assert (found.prompt, found.target) == ((4, 5), (6, 7, 8))
    assert (found.labels, found.num_targets) == ((6, IGNORED, 8), 2)
    # nothing predicts the first token
    (whole,) = read([{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}])
    assert (whole.prompt, whole.labels) == ((4,), (5, 6))
    padded = {"input_ids": [0, 4, 5, 6], "labels": [IGNORED, 4, 5, 6], "attention_mask": [0, 1, 1, 1]}
    assert read([padded])[0] == whole


def test_rows_of_token_ids_need_no_tokenizer(gates, pool, model):
    engine = Composer(model, pool)
    rows = [{"input_ids": [4, 5, 6, 7, 8], "labels": [IGNORED, IGNORED, 6, 7, 8]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    gates(pool).fit(engine, rows, steps=2, batch_size=2, progress=False)
    with pytest.raises(InvalidTask, match="no tokenizer"):
        gates(pool).fit(engine, [("a", "b")], steps=2, progress=False)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "dataset is empty"),
        ({}, "dataset is empty"),
        ({"a": [("x", "y")], "b": []}, r"dataset\['b'\] is empty"),
        ({"a": Task([])}, r"dataset\['a'\] is empty"),
        ("text", "not rows"),
        (3, "not rows"),
        ([("x", "y"), ("x",)], "row 2 of dataset is"),
        ([("x", 3)], "row 1 of dataset is"),
        ([("x", " ")], "empty target"),
        ([{"input": "x"}], "no 'target' or 'output': rows are pairs"),
        ([{"text": "x"}], r"row 1 of dataset has \['text'\], and no 'label'"),
        ([{"words": "x"}], "no 'input' and no 'target'"),
        ({"input": "x", "target": "y"}, "is one row"),
        ({"train": [("x", "y")], "test": [("x", "y")]}, "perhaps splits"),
        ([{"input_ids": [4, 5]}], "no 'labels'"),
        ([{"input_ids": [4, 5], "labels": [5]}], "2 input_ids, but 1 labels"),
        ([{"input_ids": [4, 5], "labels": [4, IGNORED]}], "no label to predict"),
        ([{"input_ids": [4, 5.0], "labels": [4, 5]}], "not a list of token ids"),
        ([{"input_ids": [4, 61], "labels": [4, 5]}], "token 61, but the model knows those from 0 to 60"),
        ([{"input_ids": [4, -1], "labels": [4, 5]}], "token -1, but"),
        ([{"input_ids": [4, 5], "labels": [4, -7]}], "label -7, neither a token of the model's 61 nor -100"),
    ],
)
def test_what_cannot_be_used_is_named(read, rows, said):
    with pytest.raises(InvalidTask, match=said):
        read(rows)


def test_an_expert_that_the_pool_has_not_is_named_with_the_row(read):
    with pytest.raises(UnknownExpert, match="row 2 of dataset: no expert 'd' in the pool"):
        read([("x", "y"), {"input": "x", "target": "y", "expert": "d"}])


def test_a_router_that_learns_from_each_experts_rows_has_to_know_them(read_apart):
    with pytest.raises(InvalidTask, match="row 1 of dataset does not say whose task it is"):
        read_apart([("x", "y")])
    with pytest.raises(UnknownExpert, match="no expert 'bb' in the pool, did you mean 'b'"):
        read_apart({"bb": [("x", "y")]})
    assert [row.expert for row in read_apart({"b": [("x", "y")]})] == [1]


def test_a_row_longer_than_the_models_context_is_refused(gates, pool, make_model, tokenizer):
    short = make_model("llama", max_position_embeddings=8)
    with pytest.raises(InvalidTask, match="context is 8"):
        RowReader(Owners.of(gates(pool)), short, tokenizer).read([{"input_ids": [4] * 9, "labels": [4] * 9}])
