"""The code of the page on continual training, on the real model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "continual.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "docs/continual.md", "exec"), names)
    assert [adapter.rank for adapter in names["adapters"].values()] == [4, 4]
