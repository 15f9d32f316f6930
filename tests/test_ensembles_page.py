"""docs/ensembles.md: its code runs on the embedded model, and says what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ensembles.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs_and_its_two_ways_agree(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(code, "docs/ensembles.md", "exec"), names)
    assert names["found"].best == names["said"] == ["positive", "negative"]
    assert torch.allclose(names["found"].probabilities.sum(1), torch.ones(2))
    assert float(names["found"].disagreement.min()) > 0
    assert [reward.argmax().item() for reward in (names["careful"], names["one"])] == [0, 0]
    assert names["several"].rewards_MB.shape == (3, 2)
