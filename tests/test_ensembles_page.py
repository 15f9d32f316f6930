"""docs/ensembles.md: its code runs on the embedded model, and says what the page says."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.slow
def test_the_code_of_the_page_runs_and_its_two_ways_agree(run_page):
    names = run_page("docs/ensembles.md")
    assert names["found"].best == names["said"] == ["positive", "negative"]
    assert torch.allclose(names["found"].probabilities.sum(1), torch.ones(2))
    assert float(names["found"].disagreement.min()) > 0
    assert [reward.argmax().item() for reward in (names["careful"], names["one"])] == [0, 0]
    assert names["several"].rewards_MB.shape == (3, 2)
