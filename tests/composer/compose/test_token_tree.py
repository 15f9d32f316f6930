"""Rows that begin alike as one tree: which tokens are read, where, what each sees, and which predicts what."""

from __future__ import annotations

import torch

from loraweave.composer.compose.examples import token_tree, tree_inputs
from loraweave.composer.model.batches import IGNORED, EncodedRow

ROWS = [EncodedRow((7, 8, 9), (1, 2)), EncodedRow((7, 8, 9), (1, 3, 2)), EncodedRow((7, 8), (5,)), EncodedRow((4,), (9,))]


def read(row):
    return (row.prompt + row.target)[:-1]


def test_what_rows_begin_with_in_common_is_read_once():
    tree = token_tree(ROWS)
    beginnings = {read(row)[: end + 1] for row in ROWS for end in range(len(read(row)))}
    assert len(tree) == len(beginnings) == 6


def test_every_predictor_sees_its_own_row_up_to_itself_and_nothing_else():
    tree = token_tree(ROWS)
    for number, row in enumerate(ROWS):
        for k in range(len(row.target)):
            slot = int(tree.slot_RK[number, k])
            seen = tree.sees_TT[slot].nonzero().flatten()
            by_position = {int(tree.position_T[place]): int(tree.ids_T[place]) for place in seen}
            expected = read(row)[: len(row.prompt) + k]
            assert by_position == dict(enumerate(expected))
            assert len(seen) == len(expected)


def test_predictors_come_last_and_targets_are_ignored_beyond_a_shorter_one():
    tree = token_tree(ROWS)
    used = {int(slot) for row, slots in zip(ROWS, tree.slot_RK, strict=True) for slot in slots[: len(row.target)]}
    assert used == set(range(-tree.num_predictors, 0))
    assert tree.target_RK.tolist() == [[1, 2, IGNORED], [1, 3, 2], [5, IGNORED, IGNORED], [9, IGNORED, IGNORED]]


def test_a_batch_of_trees_hides_its_padding():
    trees = [token_tree(ROWS[:2]), token_tree(ROWS[2:3])]
    inputs = tree_inputs(trees, 0, torch.float32, torch.device("cpu"))
    assert inputs["input_ids"].shape == (2, 5)
    assert inputs["attention_mask"].shape == (2, 1, 5, 5)
    seen_BTT = inputs["attention_mask"][:, 0] == 0
    assert torch.equal(seen_BTT[1, 3:, 3:], trees[1].sees_TT)
    assert not seen_BTT[1, 3:, :3].any()
    assert torch.equal(seen_BTT[1, :3, :3], torch.eye(3, dtype=torch.bool))
