"""`loraweave study`, and `loraweave merge` of a recipe."""

import json

import pytest
import torch
from command_line import call
from safetensors.torch import load_file

import loraweave as lw


@pytest.fixture
def file(two, rows, base):
    methods = "methods: [base, {name: examples shown, method: base, shown: true}]"
    said = f"base: {base}\ntasks: rows.jsonl\n{methods}\nshots: 1\nnum_test: 2\n"
    (two.parent / "study.yaml").write_text(said)
    return two.parent / "study.yaml"


def test_a_study_prints_a_table_for_each_metric_and_says_where_the_rest_is(file, monkeypatch):
    (file.parent / "own_metrics.py").write_text("def length(answer, targets):\n    return len(answer)\n")
    monkeypatch.syspath_prepend(str(file.parent))
    done = call("study", file, "--out", "runs", "--metric", "own_metrics:length")
    assert done.exit_code == 0, done.output
    assert "exact_match (%), 1 examples\n" in done.stdout
    assert "length, 1 examples\n" in done.stdout
    assert "wrote runs/report.html" in done.stderr
    told = json.loads(call("study", file, "--out", "runs", "--json").stdout)
    assert told["failures"] == {}
    assert {figure["method"] for figure in told["figures"]} == {"base", "examples shown"}


def test_a_study_with_a_cell_that_fails_ends_with_status_1_and_names_it(file):
    file.write_text(file.read_text().replace("methods: [", "methods: [{method: lora, target_modules: [nowhere]}, "))
    done = call("study", file)
    assert done.exit_code == 1
    assert "failed: rows, lora, 1 examples, seed 0: UnknownName: " in done.stderr
    assert (file.parent / "study-results" / "report.html").is_file()


@pytest.mark.parametrize("text", ["own", "nowhere:length", "json:lenght", ":dumps"])
def test_a_metric_that_cannot_be_imported_is_wrong_usage(file, text):
    done = call("study", file, "--metric", text)
    assert (done.exit_code, "give MODULE:FUNCTION" in " ".join(done.stderr.split())) == (2, True)


def test_a_recipe_with_a_formula_is_that_formula_over_its_pool(two, here):
    (here / "recipe.yaml").write_text("formula: 0.5*left + right\npool: pool\nrank: 1\n")
    assert call("merge", "recipe.yaml", "--out", "out").exit_code == 0
    pool = [lw.Adapter.from_pretrained(two / name) for name in ("left", "right")]
    expected = lw.merge(pool, [0.5, 1.0], rank=1)
    assert lw.Adapter.from_pretrained("out").layers.keys() == expected.layers.keys()
    assert lw.Adapter.from_pretrained("out").rank == 1


def test_a_recipe_of_mergekits_takes_folders_beside_it_and_writes_its_dtype(two, here):
    models = "".join(f"  - {{model: pool/{name}, parameters: {{weight: 1.0}}}}\n" for name in ("left", "right"))
    (here / "recipe.yaml").write_text(f"merge_method: ties\nbase_model: tiny\ndtype: bfloat16\nmodels:\n{models}")
    told = json.loads(call("merge", "recipe.yaml", "--out", "out", "--json").stdout)
    assert (told["method"], told["dtype"], told["recipe"]) == ("mergekit", "bfloat16", "recipe.yaml")
    written = load_file("out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--weights", "0.5"], 2, "leave --weights, --method"),
        (["--method", "ties"], 2, "leave --weights, --method"),
        ([], 1, "WeightingError: recipe.yaml: 'slerp' works on whole weights"),
    ],
)
def test_a_recipe_that_cannot_be_followed_leaves_nothing(here, words, status, said):
    (here / "recipe.yaml").write_text("merge_method: slerp\nmodels: []\n")
    done = call("merge", "recipe.yaml", "--out", "out", *words)
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (status, True)
    assert not (here / "out").exists()
