"""The pages: the generated one is current, and what they name exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraweave import errors, registry

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_of_registered_names_is_current():
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "tables.py", "--print"], capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "registries.md").read_text(encoding="utf-8") == run.stdout, "run scripts/tables.py"


def test_every_registered_name_is_in_the_docs():
    page = (ROOT / "docs" / "registries.md").read_text(encoding="utf-8")
    missing = [name for folder in registry.FOLDERS for name in registry.names(folder) if f"| `{name}` |" not in page]
    assert missing == []


def test_the_code_of_the_page_of_registered_names_runs(run_page):
    run_page("docs/registries.md")


def test_the_code_of_the_page_on_merging_runs(run_page, tmp_path):
    names = run_page("docs/merging.md")
    assert (names["row"].rank_in, names["row"].rank_out) == (16, 8)
    assert (tmp_path / "merged" / "adapter_config.json").exists()


def test_the_code_of_the_page_on_stores_runs(run_page, here, capsys):
    run_page("docs/stores.md")
    assert capsys.readouterr().out == "Hub('adapters')\n0\n"


def test_the_code_of_the_page_on_identity_runs(run_page, tmp_path):
    names = run_page("docs/identity.md")
    history = names["hub"].history("antonym")
    assert [record.version for record in history] == [1, 2, 3]
    assert history[0].hash == history[2].hash == names["first"].hash
    assert history[1].description == names["record"].description
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()


def test_the_page_on_continual_training_names_every_way():
    page = (ROOT / "docs" / "continual.md").read_text(encoding="utf-8")
    assert [name for name in registry.names("continual") if f"| `{name}` |" not in page] == []


def test_the_code_of_the_page_on_rows_runs(run_page, capsys):
    run_page("docs/rows.md")
    assert capsys.readouterr().out.startswith("example 1 is 'ab', not a pair of texts (input, target): ")


def test_the_code_of_the_page_on_torch_compile_runs(run_page):
    run_page("docs/compile.md")


def test_the_code_of_the_page_on_live_mixtures_runs(run_page):
    run_page("docs/mixing.md")


def test_the_code_of_the_page_on_models_runs(run_page):
    run_page("docs/models.md")


def test_the_code_of_the_page_on_pools_runs(run_page, capsys):
    run_page("docs/pools.md")
    assert capsys.readouterr().out.startswith("hits ")


def test_the_page_on_merging_names_every_method():
    page = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    assert [name for name in registry.names("methods") if f"`{name}`" not in page] == []


def test_the_architecture_page_names_every_room_and_error():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = [name for name, found in vars(errors).items() if isinstance(found, type)]
    assert [name for name in named if not re.search(rf"\b{name}\b", page)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_file_that_a_page_links_to_exists(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


# a changelog names what once was
@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_a_source_file_that_a_page_names_exists(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:hub|retrieval|routers|composer|tests|loraweave|scripts|docs)/[\w./-]+)`", text))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
