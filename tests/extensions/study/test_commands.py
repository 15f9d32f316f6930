"""`loraweave study`, and `loraweave eval --harness`."""

import json

import pytest
from command_line import adapter, call, cells, check_table, write_rows

from loraweave.retrieval.fusion import wilson


@pytest.fixture
def left(here):
    """The folder of an adapter, beside one other."""
    for seed, name in enumerate(("left", "right")):
        adapter(name, seed).save_pretrained(here / "pool" / name)
    return here / "pool" / "left"


@pytest.fixture
def file(here, base):
    """The file of a study of three rows beside it."""
    write_rows(here / "rows.jsonl", [{"input": text, "target": target} for text, target in ("ab", "cd", "ef")])
    methods = "methods: [base, {name: examples shown, method: base, shown: true}]"
    (here / "study.yaml").write_text(f"base: {base}\ntasks: rows.jsonl\n{methods}\nshots: 1\nnum_test: 2\n")
    return here / "study.yaml"


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


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_table_of_a_study(width, file, base, left, monkeypatch):
    long = ", ".join(f"{{name: {name}, file: rows.jsonl}}" for name in ("letters", "other_letters"))
    said = f"base: {base}\npool: {left.parent}\ntasks: [{long}]\nmethods: [base, uniform, best_single]"
    file.write_text(f"{said}\nshots: 1\nnum_test: 2\n")
    check_table(["study", file], width, monkeypatch)


def test_eval_scores_by_a_task_of_lm_eval(left, base, here, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    (here / "rows.jsonl").write_text('{"text": "a", "choices": ["a", "b"], "right": 1}\n' * 2)
    (here / "tasks").mkdir()
    (here / "tasks" / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {here / 'rows.jsonl'}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{right}}"\n'
    )
    words = ["eval", left, "--harness", "letters", "--include-path", "tasks", "--base", base]
    done = call(*words, "--json")
    assert json.loads(done.stdout)["letters"]["acc,none"] in (0.0, 1.0)
    printed = [cells(line) for line in call(*words).stdout.splitlines()]
    low, high = wilson(printed[1][2] == "1.0000", 2)
    assert printed[1][:2] == ["letters", "acc"]
    assert printed[1][3] == f"{low:.3f} to {high:.3f}"
    assert call("eval", left, "--base", base).exit_code == 2
    assert call(*words[:2], "rows.jsonl", *words[2:]).exit_code == 2
