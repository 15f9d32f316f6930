"""Running sums of layers, changed as the cache is whose tokens they sum up."""

from __future__ import annotations

import pytest
import torch

from loraweave.extensions.routers.by_sequence import RunningSums


def state_of(num_rows, num_tokens):
    """Whose sums are ten times the row and the token."""
    state = RunningSums(torch.ones(num_rows, 0, dtype=torch.bool))
    for token in range(num_tokens):
        state.append(torch.ones(num_rows, 1, dtype=torch.bool))
        state.put("layer", 10.0 * torch.arange(num_rows)[:, None, None] + token)
    return state


CHANGES = {
    "reorder": (lambda state: state.reorder_cache(torch.tensor([2, 0, 0])), [[20, 21, 22], [0, 1, 2], [0, 1, 2]]),
    "crop": (lambda state: state.crop(-2), [[0], [10], [20]]),
    "repeat": (lambda state: state.batch_repeat_interleave(2), [[r, r + 1, r + 2] for r in (0, 0, 10, 10, 20, 20)]),
    "select": (lambda state: state.batch_select_indices(torch.tensor([2])), [[20, 21, 22]]),
    "reset": (lambda state: state.reset(), [[], [], []]),
}


@pytest.mark.parametrize(("change", "left"), CHANGES.values(), ids=CHANGES)
def test_sums_and_tokens_are_changed_as_a_cache_is(change, left):
    state = state_of(3, 3)
    change(state)
    assert state.sums["layer"][..., 0].tolist() == left
    assert state.real_BT.shape == (len(left), len(left[0]))
    assert state.get_seq_length() == len(left[0])
    assert {layer: s_B1E.flatten().tolist() for layer, s_B1E in state.last().items()} == (
        {"layer": [row[-1] for row in left]} if left[0] else {}
    )


def test_a_token_that_some_layers_did_not_reach_can_be_taken_back():
    state = state_of(2, 3)
    state.append(torch.ones(2, 1, dtype=torch.bool))
    state.put("other", torch.zeros(2, 4, 1))
    assert list(state.last()) == ["other"]
    state.crop(-1)
    assert list(state.last()) == ["layer", "other"]
    assert state.last()["layer"].flatten().tolist() == [2, 12]
