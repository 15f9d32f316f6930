"""The page on rewards and posteriors: its code runs."""

import pytest


@pytest.mark.slow
def test_the_code_of_the_page_runs_and_praise_has_the_higher_reward(run_page):
    names = run_page("docs/extensions/rewards.md")
    assert [reward.argmax().item() for reward in (names["careful"], names["one"])] == [0, 0]
    assert names["several"].rewards_MB.shape == (3, 2)
