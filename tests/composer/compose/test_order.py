"""Programs of adapters on a tiny model: two that were trained for one mapping each, and what order() makes of them."""

from __future__ import annotations

import json

import pytest

import loraweave as lw
from loraweave.composer.compose.program import Program
from loraweave.composer.compose.program_search import Asked, Step
from loraweave.composer.model import scoring
from loraweave.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BaseModelMismatch,
    CompositionError,
    EmptyIndex,
    InvalidTask,
    WeightingError,
)

DESCRIPTIONS = {"one": "go on", "two": "do it"}
EXAMPLES = [("a", "i"), ("b", "j"), ("c", "k"), ("d", "l")]


@pytest.fixture
def program(trained_letters, tokenizer, letter_hub):
    return lw.order(trained_letters[0], tokenizer, letter_hub, EXAMPLES, progress=False)


def test_the_order_of_two_trained_adapters_is_found_and_answers(program):
    assert str(program) == "one > two"
    assert program.predict(["d", "a"]) == ["l", "i"]
    assert program.evaluate(EXAMPLES)["value"] == 1.0
    assert program.report["one", "two"].hits == 1.0
    assert program.report.chosen == ("one", "two")


def test_the_loss_of_a_program_is_that_of_the_targets_after_what_the_first_step_answers(program, trained_letters, tokenizer):
    model, adapters = trained_letters
    asked = {name: lw.Task([], instruction=text) for name, text in DESCRIPTIONS.items()}
    for first, last in (("one", "two"), ("two", "one")):
        with lw.Composer(model, [adapters[first]]).activate({first: 1.0}):
            between = scoring.predict(model, tokenizer, asked[first], [text for text, _ in EXAMPLES])
        pairs = [(text, target) for text, (_, target) in zip(between, EXAMPLES, strict=True)]
        with lw.Composer(model, [adapters[last]]).activate({last: 1.0}):
            want = scoring.losses(model, tokenizer, asked[last], pairs)
        row = program.report[first, last]
        assert row.loss == pytest.approx(sum(want[: row.num_examples]) / row.num_examples, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("trees", [True, False])
def test_readings_are_the_losses_of_each_row_alone_and_no_question_is_asked_twice(
    trained_letters, tokenizer, letter_hub, trees
):
    model, adapters = trained_letters
    steps = [Step(name, DESCRIPTIONS[name]) for name in ("one", "two")] + [Step(None, "say it")]
    counted = []
    asking = Asked(lw.Composer(model, list(adapters.values())), tokenizer, lw.Task([]), counted.append)
    asking._can_share = trees
    targets = [(step, text, target) for step in steps for text, target in [("a", "e"), ("eg", "ik f"), ("b", "j")]]
    found = asking.readings(targets + targets)
    again = asking.readings(targets[:3])
    assert (sum(counted), asking.count) == (9, 9)
    assert again == found[:3] == found[9:12]
    for (step, text, target), reading in zip(targets, found, strict=False):
        alone = lw.Composer(model, list(adapters.values()))
        with alone.activate(step.mixture or {}):
            (want,) = scoring.losses(model, tokenizer, lw.Task([], instruction=step.instruction), [(text, target)])
        assert reading.loss == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert found[0].hit
    assert not found[1].hit


def test_answers_end_at_the_lower_limit_and_are_one_batch_whatever_step_is_asked(
    trained_letters, tokenizer, letter_hub, monkeypatch
):
    model, adapters = trained_letters
    questions = [(Step("one", DESCRIPTIONS["one"]), "a"), (Step(None, "say it", max_new_tokens=4), "a")]
    calls = []
    generate = scoring.generate

    def counted(model, tokenizer, prompts, **options):
        calls.append((len(prompts), options["max_new_tokens"]))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(scoring, "generate", counted)
    engine = lw.Composer(model, list(adapters.values()))
    answers = {most: Asked(engine, tokenizer, lw.Task([]), [].append, most).answers(questions) for most in (2, 8)}
    assert calls == [(2, 2), (1, 4), (1, 8)]
    for cut, whole in zip(answers[2], answers[8], strict=True):
        assert whole.startswith(cut)
    assert len(answers[2][1]) < len(answers[8][1])


def test_a_single_adapter_that_solves_the_task_is_the_program(trained_letters, tokenizer, letter_hub):
    found = lw.order(trained_letters[0], tokenizer, letter_hub, list(zip("efgh", "ijkl", strict=True)), progress=False)
    assert str(found) == "two"
    assert {len(row.steps) for row in found.report.rows} == {1}


def test_labels_are_ranked_by_the_last_step(trained_letters, tokenizer, letter_hub):
    task = lw.Task(EXAMPLES, labels=["i", "j", "k", "l"])
    found = lw.order(trained_letters[0], tokenizer, letter_hub, task, progress=False)
    assert found.predict(["b", "c"]) == ["j", "k"]


def test_a_saved_program_comes_back_and_a_changed_adapter_is_refused(
    program, trained_letters, tokenizer, letter_hub, tmp_path
):
    model, adapters = trained_letters
    path = program.save(tmp_path / "program.json")
    back = Program.load(path, model, tokenizer, letter_hub)
    assert (back.steps, back.task, back.report) == (program.steps, program.task, program.report)
    assert back.predict(["c"]) == ["k"]
    letter_hub.add(lw.merge([adapters["two"]], [0.5]), name="two", replace=True)
    with pytest.raises(CompositionError, match="made with adapter 'two' of content"):
        Program.load(path, model, tokenizer, letter_hub)
    letter_hub.remove("two")
    with pytest.raises(AdapterNotFound):
        Program.load(path, model, tokenizer, letter_hub)


def test_a_program_of_another_model_is_refused(program, make_model, tokenizer, letter_hub, tmp_path):
    other = make_model("llama", hidden_size=24)
    with pytest.raises(BaseModelMismatch):
        Program.load(program.save(tmp_path / "program.json"), other, tokenizer, letter_hub)


def test_damaged_and_newer_files_are_refused(program, trained_letters, tokenizer, letter_hub, tmp_path):
    path = program.save(tmp_path / "program.json")
    saved = json.loads(path.read_text())
    for text, error, said in (
        (json.dumps({**saved, "format": 9}), CompositionError, "has format 9"),
        (json.dumps({**saved, "steps": [{"nam": "one"}]}), AdapterCorrupt, "is damaged"),
        ("{", AdapterCorrupt, "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=said):
            Program.load(path, trained_letters[0], tokenizer, letter_hub)
    with pytest.raises(AdapterNotFound, match="there is no file"):
        Program.load(tmp_path / "gone.json", trained_letters[0], tokenizer, letter_hub)


def test_what_cannot_be_ordered_is_refused_by_name(trained_letters, tokenizer, letter_hub, tmp_path):
    model, adapters = trained_letters
    with pytest.raises(InvalidTask, match="no examples to find an order by"):
        lw.order(model, tokenizer, letter_hub, lw.Task([], instruction="go"))
    with pytest.raises(WeightingError, match=r"asks adapters by their descriptions in a hub, but got ExpertPool"):
        lw.order(model, tokenizer, lw.ExpertPool(list(adapters.values())), EXAMPLES)
    with pytest.raises(WeightingError, match=r"order\(\) got max_steps=0"):
        lw.order(model, tokenizer, letter_hub, EXAMPLES, max_steps=0)
    with lw.Hub(tmp_path / "bare") as bare:
        with pytest.raises(EmptyIndex):
            lw.order(model, tokenizer, bare, EXAMPLES, progress=False)
        bare.add(adapters["one"])
        with pytest.raises(InvalidTask, match=r"none of the 1 adapters found in .* has a description to ask it by"):
            lw.order(model, tokenizer, bare, EXAMPLES, progress=False)
        bare.add(adapters["two"], description=DESCRIPTIONS["two"])
        found = lw.order(model, tokenizer, bare, EXAMPLES, progress=False)
        assert (str(found), found.report.left_out) == ("two", ("one",))


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/programs.md")
    assert str(names["program"]) == "past_tense > uppercase"
