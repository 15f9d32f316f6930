"""`loraweave compose`, `eval` and `export`."""

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import LAYERS, adapter, call, cells, process, write_rows

import loraweave as lw
from loraweave.errors import BaseModelMismatch, CompositionError
from loraweave.extend import fingerprint
from loraweave.types import Factors

PAIRS = [("a", "b"), ("c", "d"), ("e", "f")]
TASK = lw.Task([("ab", "c")], instruction="Once.")


def test_a_composition_is_made_scored_and_exported(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "lorahub", "--budget", "9", "--out", "c"]
    made = process("compose", *words, "--json", cwd=two.parent)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert {row["name"] for row in told["report"]["rows"]} >= {"base", "best_single", "uniform", "lorahub"}
    assert told["out"] == "c"

    # the base is the one that the composition names
    scored = call("eval", "c", rows, "--json")
    assert scored.exit_code == 0, scored.stderr
    model, tokenizer = lw.load_base(str(base))
    assert json.loads(scored.stdout) == pytest.approx(
        lw.Composition.from_pretrained("c", model, tokenizer).evaluate(PAIRS), rel=1e-6
    )


def test_a_composition_by_a_router_is_made_and_scored_and_never_exported(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "arrow", "--out", "c"]
    made = call("compose", *words, "--option", "top_k=1")
    assert made.exit_code == 0, made.stderr
    assert "router 'arrow' weighs every adapter for each token and layer" in made.stderr
    told = json.loads(call("compose", *words, "--json").stdout)
    assert (told["weights"], told["router"], told["report"]["chosen"]) == ({}, "arrow", "arrow")
    scored = call("eval", "c", rows, "--json")
    model, tokenizer = lw.load_base(str(base))
    kept = lw.Composition.from_pretrained("c", model, tokenizer)
    assert json.loads(scored.stdout) == pytest.approx(kept.evaluate(PAIRS), rel=1e-6)
    exported = call("export", "c", "--out", "p")
    assert (exported.exit_code, exported.stderr.split(":")[0]) == (1, "ScopeError")
    assert not Path("p").exists()


def test_an_average_is_exported_member_by_member(two, base, rows):
    made = call("compose", "--base", base, "--pool", two, "--examples", rows, "--out", "my average")
    assert made.exit_code == 0, made.stderr
    assert "`loraweave export` makes a PEFT folder of each member" in made.stderr
    done = call("export", "my average", "--out", "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["member-0", "member-1"]
    assert "my average averages the probabilities of gradient (1), few_shot (3)" in done.stderr
    assert "nothing is merged: the members ask by different prompts" in done.stderr
    composed = lw.Composition.from_pretrained("my average")
    for number, member in enumerate(composed.members.values()):
        exported = lw.Adapter.from_pretrained(f"out/member-{number}")
        torch.testing.assert_close(exported.delta(LAYERS[0]), member.adapter.delta(LAYERS[0]))
    # the same again, in the same place; a folder that holds something else is left alone
    assert call("export", "my average", "--out", "out").exit_code == 0
    Path("full/member-1").mkdir(parents=True)
    Path("full/member-1/diary.txt").write_text("mine")
    refused = call("export", "my average", "--out", "full")
    assert (refused.exit_code, refused.stderr.split(":")[0]) == (1, "AdapterExists")
    assert os.listdir("full") == ["member-1"]


def test_an_average_of_adapters_under_one_prompt_is_also_merged_and_told_with_both_losses(two, base):
    model, tokenizer = lw.load_base(str(base))
    its = {"base_model": str(base), "fingerprint": fingerprint(model)}
    parts = {
        name: dataclasses.replace(lw.Composition.of(model, tokenizer, TASK, adapter(name, seed, **its)), share=share)
        for seed, (name, share) in enumerate({"left": 1.0, "right": 3.0}.items())
    }
    steps = {"left": parts["left"], "right": parts["right"]}
    program = dataclasses.replace(parts["left"], stored=None, steps=steps)
    average = lw.Composition.of(model, tokenizer, TASK, parts)
    average.save_pretrained("average")
    done = call("export", "average", "--out", "out")
    assert done.exit_code == 0, done.stderr
    merged = lw.Adapter.from_pretrained("out/merged")
    want = 0.25 * parts["left"].adapter.delta(LAYERS[0]) + 0.75 * parts["right"].adapter.delta(LAYERS[0])
    torch.testing.assert_close(merged.delta(LAYERS[0]), want)
    loss = lw.Composition.of(model, tokenizer, TASK, merged).losses()[0]
    assert f"out/merged: loss {loss:.3f} on the 1 examples, the average {average.losses()[0]:.3f}" in done.stderr
    # what is no adapter is left out, with the commands for what is in it
    members = {"both": program, "base": lw.Composition.of(model, tokenizer, TASK)}
    dataclasses.replace(average, members=members).save_pretrained("mixed")
    done = call("export", "mixed", "--out", "mixed out")
    assert done.exit_code == 0, done.stderr
    assert "`loraweave export mixed/member-0/member-1 --target peft --out 'mixed out/member-0'` takes right" in done.stderr
    assert "base is the base model itself, and needs no folder" in done.stderr


def test_a_composition_is_read_without_a_model_by_the_base_that_it_recorded(two, base, rows):
    assert (
        call("compose", "--base", base, "--pool", two, "--examples", rows, "--method", "uniform", "--out", "c").exit_code
        == 0
    )
    composed = lw.Composition.from_pretrained("c")
    assert composed.model.name_or_path == str(base)
    with pytest.raises(CompositionError, match="pass both, or neither"):
        lw.Composition.from_pretrained("c", composed.model)
    recipe = json.loads(Path("c/composition.json").read_text())
    for name in ("", str(base / "gone")):
        Path("c/composition.json").write_text(json.dumps({**recipe, "base_model": name}))
        with pytest.raises(BaseModelMismatch, match=re.escape(f"for the base model {name!r}, which cannot be loaded")):
            lw.Composition.from_pretrained("c")


def test_the_python_in_a_saved_composition_s_readme_runs_in_its_folder(two, base, rows, monkeypatch, capsys):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "uniform", "--out", "c"]
    assert call("compose", *words).exit_code == 0
    text = Path("c/README.md").read_text()
    composed = lw.Composition.from_pretrained("c")
    loss = composed.report["uniform"].loss
    for line in (
        "chosen: uniform (as asked)",
        f"mean loss on them: {loss:.3f}",
        "examples: 3",
        "- Base model: a local folder",
    ):
        assert line in text
    expected = composed.predict(["a"])
    monkeypatch.chdir("c")
    capsys.readouterr()
    exec(compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec"), {})
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_program_is_answered_with_commands_that_export_its_steps(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "manual"]
    steps = {}
    model, tokenizer = lw.load_base(str(base))
    for name in ("left", "right"):
        assert call("compose", *words, "--weight", f"{name}=1", "--out", name).exit_code == 0
        steps[name] = lw.Composition.from_pretrained(name, model, tokenizer)
    dataclasses.replace(steps["left"], stored=None, all_weights={}, steps=steps).save_pretrained("both")
    refused = call("export", "both", "--max-rank", 3, "--out", "p")
    assert (refused.exit_code, refused.stderr.split(":")[0]) == (1, "ScopeError"), refused.stderr
    assert "'both' is the program left > right, whose steps answer in turn" in refused.stderr
    command = shlex.split(refused.stderr.split("`")[3])
    assert command == ["loraweave", "export", "both/member-1", "--target", "peft", "--max-rank", "3", "--out", "p"]
    assert call(*command[1:]).exit_code == 0
    assert torch.allclose(lw.Adapter.from_pretrained("p").delta(LAYERS[0]), adapter("right", 1).delta(LAYERS[0]))


def test_a_composition_is_pruned_tuned_and_cut_on_the_way(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--out", "c", "--method", "manual"]
    made = call(
        "compose", *words, "--weight", "left=1", "--weight", "right=1", "--prune", "100", "--tune", "2", "--rank", "1"
    )
    assert made.exit_code == 0, made.stderr
    assert "rank" in made.stdout
    model, tokenizer = lw.load_base(str(base))
    kept = lw.Composition.from_pretrained("c", model, tokenizer)
    assert [row.name for row in kept.report.rows][-3:] == ["pruned", "tuned", "cut"]
    assert (len(kept.weights), kept.adapter.rank, kept.tuned_steps) == (1, 1, 2)


def test_export_gives_the_weighted_sum_as_a_peft_folder(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--out", "c", "--method", "manual"]
    made = call("compose", *words, "--weight", "left=0.25", "--weight", "right=-1")
    assert made.exit_code == 0, made.stderr
    assert "saved to c" in made.stderr
    done = call("export", "c", "--out", "p")
    assert done.exit_code == 0, done.stderr
    want = 0.25 * adapter("left", 0).delta(LAYERS[0]) - adapter("right", 1).delta(LAYERS[0])
    torch.testing.assert_close(lw.Adapter.from_pretrained("p").delta(LAYERS[0]), want)


def test_compose_shows_its_weights_by_size(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "manual"]
    done = call("compose", *words, "--weight", "left=0.25", "--weight", "right=-1")
    assert [cells(line) for line in done.stdout.splitlines()[-2:]] == [["right", "-1"], ["left", "0.25"]]


def test_compose_in_a_pipe_tells_its_stages_and_the_weights_that_count(here, base, rows):
    for seed in range(5):
        adapter(f"a{seed}", seed).save_pretrained(here / "pool" / f"a{seed}")
    weights = {"a0": -1, "a1": 0.5, "a2": 0.06, "a3": 0.04, "a4": -0.03}
    words = ["compose", "--base", base, "--pool", here / "pool", "--examples", rows, "--method", "manual", "--tune", "1"]
    weighed = [word for name, weight in weights.items() for word in ("--weight", f"{name}={weight}")]
    done = call(*words[:-2], *weighed)
    assert [cells(line) for line in done.stdout.splitlines()[-3:]] == [["a0", "-1"], ["a1", "0.5"], ["a2", "0.06"]]
    assert "2 more adapters have weights of at most 0.04; --json shows all\n" in done.stderr
    tuned = call(*words, "--prune", "0", "--weight", "a0=1", "--weight", "a1=1")
    stages = ["loading the base model", "measuring adapters", "leaving adapters out", "training composition"]
    assert [line for line in tuned.stderr.splitlines() if line in stages] == stages
    assert set(stages) & set(call("--quiet", *words, "--weight", "a0=1").stderr.splitlines()) == set()
    few_shot = call(*words[:-4], "--method", "few_shot", "--option", "steps=1", "--option", "folds=0")
    told = few_shot.stderr.splitlines()
    assert "training on all examples" in told
    assert [line for line in told if re.fullmatch(r"made \d+ evaluations", line)]


def test_compose_asks_for_licenses_before_the_base_is_loaded(here, base, rows):
    for name, license in (("left", "gpl-3.0"), ("right", "cc-by-nc-4.0")):
        adapter(name, card={"license": license}).save_pretrained(here / "pool" / name)
    words = ["compose", "--pool", "pool", "--examples", rows, "--method", "uniform", "--out", "c"]
    done = call(*words, "--base", "no/such/base")
    assert done.exit_code == 1
    assert "InvalidLicense: " in done.stderr
    with pytest.warns(UserWarning, match="this mixture may be used"):
        done = call(*words, "--base", base, "--allow-licenses")
    assert done.exit_code == 0, done.stderr
    assert "license: CC-BY-NC-4.0 AND GPL-3.0-only" in done.stderr
    assert json.loads(Path("c/composition.json").read_text())["license"] == "CC-BY-NC-4.0 AND GPL-3.0-only"


def test_compose_uses_the_hub_by_default(here, base, rows, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "loraweave.composer.compose.compose.compose", lambda *given, **options: seen.append((given, options)) or 1 / 0
    )
    lw.Hub("adapters").close()
    done = call("compose", "--base", base, "--examples", rows, "--num-examples", "2", "--instruction", "Go on.", "--k", "3")
    assert isinstance(done.exception, ZeroDivisionError)
    (_, _, source, task), options = seen[0]
    assert isinstance(source, lw.Hub)
    assert (task.examples, task.instruction) == ((("a", "b"), ("c", "d")), "Go on.")
    assert (options["method"], options["k"], options["budget"], options["seed"]) == ("auto", 3, 40, 0)


def test_compose_says_on_one_line_which_check_of_the_base_was_possible(two, base, rows):
    words = ("--base", base, "--pool", two, "--examples", rows, "--method", "manual", "--weight", "left=1", "--out", "c")
    done = call("compose", *words)
    assert done.exit_code == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "names and shapes" in line]
    assert len(told) == 1
    assert told[0].startswith(f"warning: 'left', 'right': made for 'tiny', while this model is '{base}'")


def test_a_composition_of_nothing_is_an_error_and_saves_nothing(two, base, rows):
    with lw.Hub("adapters") as hub:
        layers = {"model.layers.0.self_attn.q_proj": Factors(torch.ones(1, 8), torch.ones(8, 1))}
        hub.add(lw.Adapter("narrow", "org/narrow", layers))
    done = call("compose", "--base", base, "--examples", rows, "--out", "c")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("BaseModelMismatch: none of the hub's 1 adapters is for this base model")
    assert "1 for 'org/narrow'" in done.stderr
    assert not Path("c").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--method", "lorahbu"], 1, "UnknownName: no method 'lorahbu' to compose with, did you mean 'lorahub'?"),
        (["--option", "objective=entropi"], 1, "UnknownName: no objective 'entropi', did you mean 'entropy'?"),
        (["--option", "objective=labels"], 1, "InvalidTask: objective 'labels' ranks the labels of a task"),
        (["--method", "lorahub", "--option", "sigmma=1"], 1, "WeightingError: method 'lorahub' has no option 'sigmma'"),
        (["--method", "lorahub", "--option", "sigma=-1"], 1, "WeightingError: method 'lorahub' got sigma=-1; it takes"),
        (["--option", "folds=1"], 1, "WeightingError: folds is 1"),
        (["--method", "similarity"], 1, "WeightingError: method 'similarity' weighs by retrieval scores"),
        (["--method", "arrow", "--rank", "2"], 2, "but 'arrow' is a router: leave them out"),
        (["--hub", "missing"], 2, "--pool and --hub both name adapters"),
    ],
)
def test_compose_looks_at_names_and_options_before_the_base_is_loaded(words, status, said, two, rows):
    done = call("compose", "--base", "no/such-base", "--pool", two, "--examples", rows, *words)
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (status, True), done.stderr


def test_a_hub_of_the_environment_gives_way_to_a_pool(two, base, rows):
    words = ("compose", "--base", base, "--pool", two, "--examples", rows, "--method", "uniform")
    assert call(*words, env={"LORAWEAVE_HUB": "missing"}).exit_code == 0


@pytest.mark.parametrize("words", [["eval", "broken", "rows.jsonl"], ["export", "broken", "--out", "e"]])
def test_a_damaged_composition_is_named_before_the_base_is_loaded(words, here, rows):
    Path("broken").mkdir()
    Path("broken/composition.json").write_text('{"format": 2, "base_model": "no/such-base"}')
    for more in ([], ["--base", "no/such-base"]):
        done = call(*words, *more)
        assert (done.exit_code, done.stderr.split(":")[0]) == (1, "AdapterCorrupt"), done.stderr


def test_export_looks_at_its_target_before_the_base_is_loaded(here):
    Path("made").mkdir()
    done = call("export", "made", "--target", "pefd", "--out", "e", "--base", "no/such-base")
    assert done.stderr.startswith("UnknownName: no export target 'pefd', did you mean 'peft'?")


def test_compose_looks_at_its_target_before_the_base_is_loaded(two, rows):
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear")
    done = call("compose", "--base", "no/such-base", "--pool", two, "--examples", rows, "--out", "mine")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "AdapterExists")


def test_compose_without_a_hub_makes_none(here, rows):
    done = call("compose", "--examples", rows)
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "HubError")
    assert not Path("adapters").exists()


def test_a_pool_without_adapters_is_refused(here, rows):
    Path("empty").mkdir()
    done = call("compose", "--examples", rows, "--pool", "empty")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "WeightingError")


def test_eval_of_an_adapter_is_that_of_the_model_with_it(two, base, rows):
    done = call("eval", two / "left", rows, "--base", base, "--json", "--instruction", "Next letter.")
    assert done.exit_code == 0, done.stderr
    model, tokenizer = lw.load_base(str(base))
    with torch.no_grad():
        for layer in LAYERS:
            module = model.get_submodule(layer)
            module.weight += adapter("left", 0).delta(layer)
    losses = []
    for text, target in PAIRS:
        prompt = tokenizer(f"Next letter.\nInput: {text}\nOutput:")["input_ids"]
        answer = tokenizer(f" {target}")["input_ids"]
        logits = model(input_ids=torch.tensor([[*prompt, *answer, 2]])).logits[0].detach().log_softmax(dim=-1)
        wanted = [*answer, 2]
        losses.append(
            -sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(wanted)) / len(wanted)
        )
    told = json.loads(done.stdout)
    assert told["count"] == 3
    assert told["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_eval_counts_every_accepted_target(two, base, here):
    rows = [{"input": "a", "target": "a", "also_ok": ["b", "c"]}, {"input": "b", "target": ["c", "b", "a"]}]
    file = write_rows(here / "many.jsonl", rows)
    done = call("eval", two / "left", file, "--base", base, "--labels", "a,b,c", "--json")
    # every label is accepted, so whatever is ranked first is right
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["value"] == 1.0


def test_a_composition_keeps_its_own_instruction(here, rows):
    Path("c").mkdir()
    Path("c/composition.json").write_text("{}")
    assert call("eval", "c", rows, "--instruction", "other").exit_code == 2


@pytest.mark.parametrize(("split", "of"), [("", "6 rows"), ("train", "6 rows of split 'train', out of 7")])
def test_the_notes_say_how_many_examples_and_evaluations_were_used(two, base, split, of):
    lines = [{"input": f"a{number}", "target": "b", "split": split} for number in range(6)]
    write_rows(Path("r.jsonl"), [*lines, *([{"input": "c", "target": "d", "split": "test"}] if split else [])])
    words = ["--base", base, "--pool", two, "--examples", "r.jsonl", "--method", "lorahub", "--num-examples", 3]
    done = call("compose", *words, "--budget", 9, "--option", "folds=0", "--out", "c")
    assert done.exit_code == 0, done.stderr
    assert f"r.jsonl: the first 3 of {of}\n" in done.stderr
    report = json.loads(Path("c/composition.json").read_text())["report"]
    spent = {row["name"]: row["evaluations"] for row in report["rows"]}
    said = f"made {sum(spent.values())} evaluations, {spent['lorahub']} in the search 'lorahub' (--budget 9)\n"
    assert said in done.stderr
    assert "0% (0-56)" in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ('{"input": "a", "target": "b"}\n{"input": "a"', "line 2 is not JSON"),
        ("[1, 2]\n", "line 1 is [1, 2], not a pair of texts"),
        ('{"target": "b"}\n', "line 1 has ['target'], and no 'input'"),
        ('{"input": "a"}\n', "line 1 has ['input'], and no 'target'"),
        ('{"input": "a", "target": " "}\n', "line 1 (input 'a') has an empty target"),
        ('{"input": "a", "target": []}\n', "line 1 has [] as 'target'"),
        ('{"input": "a", "target": "b", "split": "test"}\n', "no rows of split 'train'; its splits are test"),
    ],
)
def test_rows_that_cannot_be_used_are_named_by_file_and_line(two, text, said):
    Path("bad.jsonl").write_text(text)
    done = call("compose", "--pool", two, "--examples", "bad.jsonl")
    assert done.exit_code == 1
    assert done.stderr.startswith("InvalidTask: bad.jsonl")
    assert said in done.stderr


def test_rows_that_are_no_text_are_refused(two):
    Path("bad.jsonl").write_bytes(b'{"input": "\xff\xfe"}')
    done = call("compose", "--pool", two, "--examples", "bad.jsonl")
    assert (done.exit_code, done.stderr.startswith("InvalidTask: bad.jsonl is not UTF-8 text")) == (1, True)


@pytest.fixture
def stored(here):
    adapter("mine", rank=12, layers=LAYERS[:1], base_model="org/base").save_pretrained(here / "mine")
    return here


def test_an_adapter_is_exported_without_a_model(stored):
    done = call("export", "mine", "--out", "p")
    assert done.exit_code == 0, done.stderr
    assert "wrote 1 layers of rank up to 12 for peft to p" in done.stdout
    assert lw.Adapter.from_pretrained("p").hash == lw.Adapter.from_pretrained("mine").hash


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--target", "pef"), 1, "did you mean 'peft'"),
        (("--max-rank", "0"), 2, "--max-rank"),
        (("--base",), 2, "--base"),
    ],
)
def test_a_wrong_use_of_export_is_named_and_writes_nothing(stored, words, status, said):
    done = call("export", "mine", "--out", "p", *words)
    assert done.exit_code == status
    assert said in " ".join(done.stderr.split())
    assert not (stored / "p").exists()


def test_eval_says_so_where_no_extension_asks_the_tasks_of_lm_eval(two, base, monkeypatch):
    monkeypatch.setattr("loraweave.registry.brought", lambda part: {})
    done = call("eval", two / "left", "--harness", "letters", "--base", base)
    assert (done.exit_code, "none of the extensions" in done.stderr) == (2, True)


def test_a_routers_folder_is_kept_with_its_adapters_and_a_formula_is_that_router(two, here):
    pool = lw.ExpertPool([lw.Adapter.from_pretrained(two / name, name=name) for name in ("left", "right")])
    lw.Hub("hub").close()
    lw.router("arrow", pool, top_k=1).save_pretrained("mix", pool=pool)
    done = call("hub", "save-composition", "mix", "mix", "--hub", "hub")
    assert done.exit_code == 0, done.stderr
    with lw.Hub("hub") as hub:
        assert lw.parse("@mix").mixture(hub).experts == pool.names
    lw.router("arrow", pool).save_pretrained("alone")
    done = call("hub", "save-composition", "alone", "alone", "--hub", "hub")
    assert done.exit_code == 1
    assert "has no adapters of its own" in " ".join(done.stderr.split())


def test_compose_takes_an_instruction_in_the_place_of_examples(here, base, monkeypatch):
    seen = []
    monkeypatch.setattr("loraweave.composer.compose.compose.compose", lambda *given, **options: seen.append(given) or 1 / 0)
    lw.Hub("adapters").close()
    done = call("compose", "--base", base, "--instruction", "Go on.")
    assert isinstance(done.exception, ZeroDivisionError)
    (_, _, _, task) = seen[0]
    assert (task.examples, task.instruction) == ((), "Go on.")
    done = call("compose", "--base", base)
    assert done.exit_code == 2
    assert "give --examples, or an --instruction" in done.stderr
