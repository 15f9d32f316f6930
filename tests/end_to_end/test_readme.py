"""README's Python runs as it stands, in a folder where only the examples are."""

from __future__ import annotations

import pytest

import loraweave as lw

pytestmark = pytest.mark.slow


def test_the_python_of_the_readme_runs(run_page):
    names = run_page("README.md")
    read = lw.Composition.from_pretrained("composed", names["model"], names["tokenizer"])
    assert (read.mean_weights, read.by_layer) == (names["composition"].mean_weights, names["composition"].by_layer)
    assert set(names["composition"].mean_weights) <= {"passive", "negation", "antonym"}
    assert names["merged"].rank == 8
    assert lw.Adapter.from_pretrained("plain").hash == names["composition"].adapter.hash
