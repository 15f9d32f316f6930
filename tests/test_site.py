"""The site: it builds without a dead link, the reference has every public name, and how-tos do what they say."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loraweave as lw
from loraweave import extend, registry

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a dead link or a name without documentation fails the build."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        # not --quiet, which also hides from --strict what it counts
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_every_public_name_has_one_entry_in_the_reference(site):
    pages = [path.read_text(encoding="utf-8") for path in (site / "reference").rglob("*.html")]
    entries = [name for page in pages for name in re.findall(r'<h2 id="loraweave\.(\w+)"', page)]
    assert sorted(entries) == sorted(lw.__all__)


def test_a_function_has_a_table_of_its_parameters_with_types_defaults_and_what_is_said_of_them(site):
    text = (site / "reference" / "composing-for-a-task" / "index.html").read_text(encoding="utf-8")
    row = re.search(
        r'<tr class="doc-section-item">\s*<td>\s*<code>checkpoint</code>.*?</tr>',
        text[text.index('id="loraweave.compose"') :],
        re.S,
    )
    cells = [" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in re.findall(r"<td>.*?</td>", row[0], re.S)]
    assert cells == [
        "checkpoint",
        "str | Path | None",
        "checkpoint is a folder from which an interrupted search resumes, to the same result.",
        "None",
    ]


def test_every_public_name_of_an_extension_and_of_the_face_for_those_who_extend_has_an_entry(site):
    pages = [path.read_text(encoding="utf-8") for path in (site / "reference").rglob("*.html")]
    entries = {name for page in pages for name in re.findall(r'<h[23] id="(loraweave\.ext[\w.]+)"', page)}
    packages = {f"{registry.EXTENSIONS}.{name}" for name in registry.extensions()} | {"loraweave.extend"}
    packages |= {f"loraweave.extend.{kit.name}" for kit in pkgutil.iter_modules(extend.__path__)}
    names = {f"{package}.{name}" for package in packages for name in importlib.import_module(package).__all__}
    # classes have entries for their members, too
    assert names - entries == set()


def test_every_command_is_in_the_reference(site):
    from typer.main import get_command

    from loraweave.cli import app

    text = (site / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    root = get_command(app)
    names = [f"loraweave {name}" for name in root.commands] + [
        f"loraweave hub {name}" for name in root.commands["hub"].commands
    ]
    assert [name for name in names if f"<code>{name}</code>" not in text] == []


def test_the_site_loads_nothing_from_another_host(site):
    loading = r'<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)="(?:https?:)?//'
    assert [path for path in site.rglob("*.html") if re.search(loading, path.read_text(encoding="utf-8"))] == []


def test_every_picture_of_the_site_is_there(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    names = [(path, name) for path, text in pages.items() for name in re.findall(r'\b(?:src|srcset)="([\w./-]+)"', text)]
    assert [(path, name) for path, name in names if path.name != "404.html" and not (path.parent / name).is_file()] == []


def test_search_ranks_a_page_that_explains_above_an_entry_of_the_same_words(site):
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    boosts = {entry["location"]: entry.get("boost", 1) for entry in found}
    assert (boosts["merging/"], boosts["reference/adapters-and-merging/"]) == (4, 1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    last = [(cell, ast.parse("".join(cell["source"])).body[-1]) for cell in cells]
    assert [cell["source"] for cell, line in last if isinstance(line, ast.Expr) and not cell["outputs"]] == []
    assert [
        text for cell in cells if re.search(r"/(?:tmp|home|work|var|root|Users)/", text := json.dumps(cell["outputs"]))
    ] == []


def test_the_notebooks_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 300_000


@pytest.mark.slow
def test_how_to_merge(run_page, tmp_path):
    names = run_page("docs/howto/merge.md")
    assert lw.Adapter.from_pretrained("merged").hash == names["small"].hash
    assert lw.Adapter.from_pretrained("merged-in-the-shell").rank == 8


def test_how_to_use_other_programs(run_page):
    names = run_page("docs/howto/other_programs.md")
    assert (names["for_vllm"].rank, names["for_vllm"].relative_error) == (6, 0.0)
    assert (names["cut"].rank, names["cut"].relative_error > 0) == (4, True)


@pytest.mark.slow
def test_how_to_answer_many_requests_in_one_batch(run_page):
    names = run_page("docs/howto/one_batch.md")
    assert names["answers"][0] == " The doctor was thanked by the judge."
    assert names["logits"].shape[0] == 4


@pytest.mark.slow
def test_how_to_compose_for_an_unseen_task(run_page):
    names = run_page("docs/howto/unseen_task.md")
    assert names["again"].mean_weights == names["composition"].mean_weights
    assert list(names["composition"].steps) == ["passive", "negation"]
    assert (names["score"]["value"], names["score"]["count"]) == (1.0, 6)


@pytest.mark.slow
def test_how_to_bring_your_own_base(run_page):
    names = run_page("docs/howto/own_base.md")
    assert len(names["mixture"].layers) == len(names["engine"].target_layers)
    assert isinstance(names["refused"], lw.BaseModelMismatch)


@pytest.mark.slow
def test_how_to_use_many_machines(run_page):
    names = run_page("docs/howto/many_machines.md")
    with lw.Hub("adapters") as trained, lw.Hub("shared") as shared:
        assert {record.name: record.hash for record in trained} == {n: each.hash for n, each in names["again"].items()}
        assert sorted(record.name for record in shared) == ["negation", "passive"]


@pytest.mark.slow
def test_how_to_route(run_page):
    with torch.random.fork_rng():
        names = run_page("docs/howto/router.md")
    assert names["again"].experts == names["pool"].names
    assert names["classifier"].experts == names["pool"].names


# what peft itself calls by a name that transformers is going to drop
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_page_for_users_of_peft_has_pefts_numbers(run_page):
    names = run_page("docs/howto/coming_from.md")
    layer = names["layer"]
    # the cross terms, from the formula
    a, b = names["passive"].layers[layer], names["negation"].layers[layer]
    cross = (0.7 * 0.4) ** 0.5 * (a.b_OR @ b.a_RI + b.b_OR @ a.a_RI)
    assert torch.allclose(names["delta"]("crossed") - names["delta"]("sum"), cross, atol=1e-5)
