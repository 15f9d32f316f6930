"""The page on studies: its file, on a tiny model with adapters of the same names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import loraweave as lw
from loraweave.extensions.study import study
from loraweave.extensions.study.study_file import Study

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "extensions" / "study.md").read_text(encoding="utf-8")


def test_the_file_of_the_page_runs_as_it_stands(tmp_path, monkeypatch, tiny_llama, tokenizer, make_adapter):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "study.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    adapters = [
        replace(make_adapter(tiny_llama, name), fingerprint=lw.base_key(tiny_llama).fingerprint)
        for name in ("plural", "uppercase")
    ]
    results = study(tmp_path / "study.yaml", model=tiny_llama, tokenizer=tokenizer, hub=adapters, progress=False)
    assert (len(results.answers), results.failures) == (4, {})
    written = {path.name for path in (tmp_path / "study-results").iterdir()}
    named = set(re.findall(r"`(?:study-results/)?([\w.]+\.(?:html|md|csv|tex|jsonl))`", PAGE))
    assert named - {"NAME.jsonl"} <= written


@pytest.mark.parametrize(("name", "tasks", "methods"), [("study", 3, 10), ("unseen", 18, 7)])
def test_the_shipped_studies_can_be_followed(name, tasks, methods):
    read = Study.read(ROOT / "examples" / f"{name}.yaml", {})
    assert len(read.tasks) >= tasks
    assert len(read.methods) >= methods


@pytest.mark.parametrize("key", list(Study.__dataclass_fields__))
def test_the_page_names_every_key(key):
    assert re.search(rf"^\| .*`{key}`", PAGE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_on_lm_eval_scores_a_mixture_and_its_formula_alike(run_page, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    names = run_page("docs/extensions/study_harness.md")
    mixed, formula = (names[kind]["results"]["pick_color"] for kind in ("mixed", "formula"))
    assert mixed["acc,none"] == formula["acc,none"]
    assert 0 <= names["base"]["acc,none"] <= 1
