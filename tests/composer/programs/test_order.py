"""Programs of adapters on a tiny model: two that were trained for one mapping each, and what order() makes of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import loraweave as lw
from loraweave.composer.compose.asked import Asked, Step
from loraweave.composer.model import scoring
from loraweave.composer.programs.program import Program, card_inputs, recombined
from loraweave.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BaseModelMismatch,
    CompositionError,
    EmptyIndex,
    InvalidTask,
    TrainingError,
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


def test_a_distilled_program_answers_alike_in_one_pass_and_says_what_was_lost(program, tmp_path):
    made = program.distil(["a", "b", "c", "d"], steps=150, lr=1e-2, progress=False)
    (row,) = made.report.rows
    assert "learned one > two from 0 inputs that it labelled; agrees with it on" in made.report.reason
    assert made.losses() == pytest.approx([row.loss] * 4, abs=2 * row.loss + 1e-3)
    assert made.task.instruction == "go on do it"
    assert [parent["name"] for parent in made.parents] == ["one", "two"]
    assert f"became {row.loss:.3f}" in made.report.reason
    trained = {layer.rsplit(".", 1)[-1] for layer in made.adapter.layers}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert made.predict(["a", "b", "c", "d"]) == program.predict(["a", "b", "c", "d"])
    made.export(tmp_path / "plain")
    assert lw.Adapter.from_pretrained(tmp_path / "plain").hash == made.adapter.hash


def test_without_inputs_the_cards_of_the_hub_are_asked(program, letter_hub):
    assert card_inputs(letter_hub, "one", ["a", "b"], 3, 0) == ["a", "b", "c"]
    # letters alone look like letters alone, whatever adapter they are of
    assert card_inputs(letter_hub, "two", ["a", "b"], 9, 0) == ["e", "f", "g", "h", "a", "b", "c", "d"]
    assert set(card_inputs(letter_hub, None, ["A: 1, 2, 3.", "B: 4, 5, 6."], 99, 0)) == {
        f"{mark}: {one}, {two}, {three}." for mark in "AB" for one in "14" for two in "25" for three in "36"
    } - {"A: 1, 2, 3.", "B: 4, 5, 6."}
    assert program.distil(num_inputs=6, steps=2, progress=False).report.chosen == "distilled"


def test_new_inputs_have_each_word_where_a_text_of_as_many_words_has_it():
    texts = ["1 2", "3 4", "5 6", "alone", "the other"]
    found = recombined(texts, 99, seed=0)
    assert set(found) == {f"{first} {last}" for first in ("1", "3", "5", "the") for last in ("2", "4", "6", "other")} - set(
        texts
    )
    assert found == recombined(texts, 99, seed=0)
    assert recombined(texts, 2, seed=0) == found[:2]
    assert recombined([], 9, seed=0) == recombined(["alone", "one"], 9, seed=0) == []


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


def test_a_program_has_nothing_to_learn_from_without_inputs(program):
    with pytest.raises(InvalidTask, match="nothing for program 'one > two' to label; inputs is empty"):
        program.distil([], progress=False)
    with pytest.raises(TrainingError, match="steps=0"):
        program.distil(["a"], steps=0)


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/programs.md")
    assert str(names["program"]) == "past_tense > uppercase"
    assert names["single"].report.reason.startswith("learned past_tense > uppercase from ")


@pytest.mark.usefixtures("warm_workers")
def test_two_workers_label_as_one_process_does_by_the_hub_alone(program, letter_hub, tmp_path, monkeypatch):
    for part in (program.model, program.tokenizer):
        part.save_pretrained(tmp_path / "base")
    model, tokenizer = lw.load_base(tmp_path / "base")
    there, settings = replace(program, model=model, tokenizer=tokenizer), {"steps": 2, "progress": False}
    monkeypatch.setattr(scoring, "BATCH_SIZE", 2)
    # none of them an example, whose answer is known
    inputs = ["ab", "bc", "cd", "da"]
    alone = there.distil(inputs, **settings)
    found = there.distil(inputs, n_jobs=2, **settings)
    assert found.adapter.hash == alone.adapter.hash
    assert found.report.reason == alone.report.reason
    letter_hub.add(replace(letter_hub["two"], name="one"), replace=True)
    with pytest.raises(CompositionError, match="the program was made with adapter 'one' of content"):
        there.distil(["a", "b"], n_jobs=1, **settings)
