"""README's Python runs as it stands, in a folder where only the examples are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import loraweave as lw

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    read = lw.Composition.from_pretrained("composed", names["model"], names["tokenizer"])
    assert (read.mean_weights, read.by_layer) == (names["composition"].mean_weights, names["composition"].by_layer)
    assert set(names["composition"].mean_weights) <= {"passive", "negation", "antonym"}
    assert names["merged"].rank == 8
    assert lw.Adapter.from_pretrained("plain").hash == names["composition"].adapter.hash
