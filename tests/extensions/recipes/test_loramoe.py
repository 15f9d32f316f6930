"""All experts for every token, in two halves that share the tasks among them."""

import statistics

import pytest
import torch

import loraweave as lw
from loraweave.errors import ScopeError, UnknownName

LAYER = "model.layers.0.mlp.up_proj"
TASKS = ("facts", "sums", "jokes")
BATCH = {
    "input_ids": torch.tensor([[3, 9, 27, 20, 5], [8, 8, 6, 0, 0], [4, 1, 1, 7, 0]]),
    "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
}


def written_out(notes, own_first, delta):
    """The sum over sites of the variance over the squared mean of every row's and expert's scaled use."""
    total = 0.0
    for w_BTE in notes.weights.values():
        scaled = []
        for row, first in enumerate(own_first):
            for expert in range(4):
                real_T = BATCH["attention_mask"][row].bool()
                use = float(w_BTE[row, real_T, expert].detach().mean())
                scaled.append(use * (1 - delta if (expert < 2) == first else 1 + delta))
        total += statistics.variance(scaled) / statistics.mean(scaled) ** 2
    return total


def test_its_loss_is_localised_by_the_tasks_of_knowledge(terms_of):
    terms, notes = terms_of(
        "loramoe", BATCH, task=["sums", "facts", "jokes"], tasks=TASKS, knowledge=("facts", "jokes"), delta=0.2, balance=0.5,
        num_experts=4, target_modules=("up_proj",),
    )  # fmt: skip
    assert len(notes.weights) == 2
    assert terms["balance"].item() == pytest.approx(0.5 * written_out(notes, (False, True, True), 0.2), rel=1e-6)


def test_without_knowledge_it_balances_all_experts_alike_and_needs_no_tasks(terms_of):
    terms, notes = terms_of("loramoe", BATCH, num_experts=4, balance=0.5, target_modules=("up_proj",))
    assert terms["balance"].item() == pytest.approx(0.5 * written_out(notes, (False,) * 3, 0.0), rel=1e-6)


def test_as_released_it_has_no_loss(terms_of):
    assert terms_of("loramoe", BATCH, knowledge=("facts",), tasks=TASKS, as_released=True)[0] == {}


def test_rows_without_a_task_are_refused_where_tasks_are_told_apart(terms_of):
    with pytest.raises(ScopeError, match=r"1 of 3 rows have none: give task=\.\.\. for each, or knowledge=\(\)"):
        terms_of("loramoe", BATCH, task=["sums", -1, "facts"], tasks=TASKS, knowledge=("facts",))


def test_knowledge_that_is_no_task_is_refused_with_the_nearest(make_model):
    with pytest.raises(UnknownName, match="knowledge of recipe 'loramoe' names 'fact', did you mean 'facts'"):
        lw.experts("loramoe", make_model("llama"), tasks=TASKS, knowledge=("fact",))


def test_training_makes_tasks_of_knowledge_use_the_first_half_and_others_the_second(make_model, tokenizer):
    dataset = {
        "sums": [("1 2", "3"), ("2 2", "4"), ("3 4", "7")],
        "facts": [("france", "paris"), ("italy", "rome"), ("spain", "madrid")],
    }
    options = {"knowledge": ("facts",), "num_experts": 4, "balance": 30.0, "delta": 0.3, "target_modules": (LAYER,)}
    with lw.experts("loramoe", make_model("llama"), tokenizer=tokenizer, **options) as made:
        made.fit(dataset, steps=25, lr=0.06, batch_size=6, warmup=0, progress=False)
        for task, texts in dataset.items():
            ids_BT = tokenizer([" ".join(texts[0])], return_tensors="pt")["input_ids"]
            made.train()(input_ids=ids_BT, task=task)
            use_E = made.notes.weights[LAYER].detach().mean(dim=(0, 1))
            ratio = float(use_E[:2].sum() / use_E[2:].sum())
            assert ratio > 1.2 if task == "facts" else ratio < 1 / 1.2
