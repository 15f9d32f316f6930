"""The code of docs/generation.md runs, and its three ways of asking give one answer."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_the_code_of_the_page_on_generation_runs(run_page, capsys):
    names = run_page("docs/generation.md")
    answers = names["answers"]
    assert answers[0] == " The doctor was thanked by the judge."
    pieces = [eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == answers
    start = names["batch"]["input_ids"].shape[1]
    assert names["tokenizer"].batch_decode(names["ids"][:, start:], skip_special_tokens=True) == answers
    assert len(names["drawn"]) == 3
