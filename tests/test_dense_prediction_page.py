"""The code of the page on dense prediction runs, and the page names what is there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "dense_prediction.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_trains_two_tasks():
    names: dict = {}
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/dense_prediction.md", "exec"), names)
    assert names["depth"].shape == (4, 8, 8)
    experts = names["model"].expert_parameters()
    assert all(value.grad is not None for name, value in experts.items() if name.endswith("b_SO"))
    assert names["base"].decode_head.classifier.weight.grad is not None
    assert names["base"].segformer.stages[0].blocks[0].mlp.fc1.weight.grad is None
