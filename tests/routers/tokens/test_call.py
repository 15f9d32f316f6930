"""What is said to be a prompt, and for how long; and how many tokens decide on the weights of one."""

from __future__ import annotations

import pytest
import torch

from loraweave.errors import ScopeError
from loraweave.routers.tokens._call import context_length, count_copies, current_prompts, prompted
from loraweave.routers.tokens._learned import Step

IDS_BT = torch.tensor([[0, 5, 6], [7, 8, 9]])
MASK_BT = torch.tensor([[0, 1, 1], [1, 1, 0]])


def test_prompts_are_the_real_tokens_inside_the_block_alone():
    assert current_prompts() is None
    with prompted(IDS_BT, MASK_BT):
        assert current_prompts().rows == [[5, 6], [7, 8]]
    assert current_prompts() is None


def test_what_the_outer_block_has_said_stays():
    with prompted(IDS_BT, MASK_BT):
        with prompted(IDS_BT[:1], MASK_BT[:1]):
            assert len(current_prompts().rows) == 2
        assert len(current_prompts().rows) == 2


def test_an_error_ends_the_block_too():
    def interrupted():
        with prompted(IDS_BT, MASK_BT):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert current_prompts() is None


def test_a_call_has_a_multiple_of_the_prompts_as_rows():
    with prompted(IDS_BT, MASK_BT):
        assert count_copies("x", current_prompts(), 6) == 3
        with pytest.raises(ScopeError, match="knows 2 prompts, but the call has 3 rows"):
            count_copies("x", current_prompts(), 3)


@pytest.mark.parametrize(
    ("num_prompt", "refresh", "lengths"),
    [
        (None, 1, [1, 2, 3, 4, 5, 6]),
        (None, 2, [1, 2, 2, 4, 4, 6]),
        (None, 4, [1, 1, 1, 4, 4, 4]),
        (3, 1, [3, 3, 3, 4, 5, 6]),
        (3, 2, [3, 3, 3, 3, 5, 5]),
        (2, 3, [2, 2, 2, 2, 5, 5]),
    ],
)
def test_the_context_grows_with_every_refresh_and_never_beyond_the_token_but_in_the_prompt(num_prompt, refresh, lengths):
    assert [context_length(number, num_prompt, refresh) for number in range(1, 7)] == lengths
    assert all(length <= max(number, num_prompt or 0) for number, length in enumerate(lengths, start=1))


VALUES_BTE = torch.tensor([[[1.0, 0.0], [3.0, 8.0], [5.0, 4.0]], [[2.0, 2.0], [9.0, 9.0], [4.0, 6.0]]])


def test_the_means_of_rows_leave_padding_out():
    step = Step(torch.tensor([[1, 1, 1], [1, 0, 1]]), torch.tensor([-1, -1]))
    assert step.row_means(VALUES_BTE).tolist() == [[3, 4], [3, 4]]


def test_the_means_of_rows_of_tokens_that_are_not_known_are_over_all():
    step = Step(torch.ones(2, 5), torch.tensor([-1, -1]))
    assert step.row_means(VALUES_BTE).tolist() == [[3, 4], [5, VALUES_BTE[1, :, 1].mean()]]
    assert step.row_means(VALUES_BTE[:, :1]).tolist() == [[1, 0], [2, 2]]
