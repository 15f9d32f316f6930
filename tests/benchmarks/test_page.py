"""TABLES.md is what the runner makes of benchmarks/data, and a run with --save adds to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import __main__ as runner
from benchmarks import _data as page
from benchmarks._run import Run, Table

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_runner_writes_from_the_data():
    assert (ROOT / "benchmarks" / "TABLES.md").read_text(encoding="utf-8") == page.page(), "run python -m benchmarks tables"


def test_every_computed_table_of_a_section_has_a_name_that_is_known():
    files = [json.loads(path.read_text(encoding="utf-8")) for path in page.FIGURES.glob("*.json")]
    named = {block["computed"] for found in files for block in found["blocks"] if "computed" in block}
    assert {"routers", "experts", "unseen, 5 examples, scores"} <= named
    assert len({found["place"] for found in files}) == len(files)


def test_a_section_has_its_blocks_in_their_order():
    blocks = [
        {"text": "what"},
        {"command": ["run this", "and that"]},
        {"computed": "some"},
        {"table": {"columns": ["a"], "rows": [["1"]]}},
    ]
    found = {"title": "One", "place": 3, "recorded": {"date": "2026-01-02", "commit": "abc"}, "blocks": blocks}
    written = page.section(found, {"some": Table("", ("b", "c"), [("2", "")])})
    head = "## One\n\nRecorded 2026-01-02 in commit abc.\n\nwhat\n\n    run this\n    and that\n\n"
    assert written == head + "| b | c |\n|---|---|\n| 2 |  |\n\n| a |\n|---|\n| 1 |\n"


def test_what_a_run_has_shown_is_kept_with_its_command_and_comes_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "FIGURES", tmp_path)
    page.write(tmp_path / "old.json", {"title": "Old", "place": 4, "blocks": [{"text": "é\n|"}]})
    shown = [Table("a title, 3 rounds", ("way", "time"), [("base", "1.00"), ("ours", "0.50")])]
    path = page.append("new", ["--save", "new", "live", "prefill"], shown)
    page.append("old", ["live"], shown)
    found, old = (json.loads(each.read_text(encoding="utf-8")) for each in (path, tmp_path / "old.json"))
    assert (found["title"], found["place"]) == ("new", 5)
    command, where, title, table = found["blocks"]
    assert command == {"command": ["python -m benchmarks --save new live prefill"]}
    assert re.match(r"\d{4}-\d\d-\d\d, commit ", where["text"])
    assert title == {"text": "a title, 3 rounds"}
    assert table == {"table": {"columns": ["way", "time"], "rows": [["base", "1.00"], ["ours", "0.50"]]}}
    assert (old["blocks"][0], old["place"], len(old["blocks"])) == ({"text": "é\n|"}, 4, 5)


def test_what_is_shared_is_said_before_the_name_of_a_measurement(tmp_path, monkeypatch):
    given = f"--rounds 2 --cpu --seed 7 --threads 0 --out {tmp_path} --report told --own x".split()
    told = typer.Typer()
    seen = []

    @told.command()
    def main(context: typer.Context, own: Annotated[str, typer.Option()]) -> None:
        seen.append((context.obj, own))

    monkeypatch.setattr(runner, "NAMES", ["told"])
    monkeypatch.setattr(runner, "import_module", lambda name: {"benchmarks.told": type("Module", (), {"app": told})}[name])
    assert CliRunner().invoke(runner.app, given, catch_exceptions=False).exit_code == 0
    ((run, own),) = seen
    assert own == "x"
    assert run == Run(rounds=2, cpu=True, seed=7, threads=0, out=tmp_path, report=True)


def test_every_measurement_is_named_in_the_help_with_its_first_line():
    printed = CliRunner().invoke(runner.app, ["--help"]).output
    assert len(runner.NAMES) > 15
    assert [name for name in runner.NAMES if not re.search(rf"^  {name} +[A-Z]", printed, re.MULTILINE)] == []


def test_every_command_of_the_results_names_a_measurement():
    pages = [(ROOT / "benchmarks" / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "TABLES.md")]
    said = {line for text in pages for line in re.findall(r"python -m benchmarks ([^\n`]*)", text)}
    options = r"(?:--(?:cpu|report)|--\w+ \S+)"
    names = {re.sub(rf"^(?:{options} )*", "", line).split()[0] for line in said if line.strip() != "--help"}
    assert names - {"--help", "NAME"} <= {*runner.NAMES, "tables"}
    assert len(names) > 15


def test_a_measurement_that_resumes_asks_for_its_folder():
    with pytest.raises(typer.BadParameter, match="--out"):
        Run().folder()
