"""How many tokens decide on the weights of one."""

from __future__ import annotations

import pytest

from loraweave.routers.tokens._call import context_length


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
