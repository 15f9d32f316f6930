"""The program among the members of "auto": adapters of the hub that answer one after the other."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose import settings, ways
from loraweave.composer.compose.program_search import ProgramSearch
from loraweave.composer.model import scoring
from loraweave.errors import ScopeError

EXAMPLES = [("a", "i"), ("b", "j"), ("c", "k"), ("d", "l")]


@pytest.fixture
def compose(trained_letters, tokenizer, letter_hub):
    task = lw.Task(EXAMPLES, instruction="go on and on")
    return partial(lw.compose, trained_letters[0], tokenizer, letter_hub, task, progress=False)


@pytest.fixture
def found(compose):
    """What "auto" makes of two adapters that solve the task one after the other."""
    return compose()


def test_a_program_is_a_member_and_answers_as_the_order_that_is_found(found, trained_letters, tokenizer, letter_hub):
    program = lw.order(trained_letters[0], tokenizer, letter_hub, found.task, progress=False)
    member = found.members["program"]
    assert list(found.members) == ["gradient", "few_shot", "program"]
    assert list(member.steps) == list(program.report.chosen) == ["one", "two"]
    assert member.predict(["d", "a"]) == program.predict(["d", "a"]) == ["l", "i"]
    assert member.evaluate(EXAMPLES)["loss"] == pytest.approx(program.report["one", "two"].loss, rel=1e-3, abs=1e-4)
    assert found.report["program"].loss == pytest.approx(program.report["one", "two"].loss, rel=1e-3, abs=1e-4)
    assert "program one > two" in found.report.reason
    assert repr(member).startswith("Composition(the program one > two")


def test_its_probabilities_are_averaged_after_what_the_first_step_answers(found, trained_letters, tokenizer):
    model, adapters = trained_letters
    newline = tokenizer("\n")["input_ids"][0]
    for text in ("b", "d", "e"):
        asked = [(found.members[name].adapter, found.members[name].task.in_orders()) for name in ("gradient", "few_shot")]
        with lw.Composer(model, [adapters["one"]]).activate({"one": 1.0}):
            (between,) = scoring.predict(model, tokenizer, lw.Task([], instruction="go on"), [text])
        shares = zip((0.2, 0.4), asked, strict=True)
        prompts = [(adapter, task.prompt(text), own / len(tasks)) for own, (adapter, tasks) in shares for task in tasks]
        prompts.append((adapters["two"], lw.Task([], instruction="do it").prompt(between), 0.4))
        written: list[int] = []
        while len(written) < 4 and not {tokenizer.eos_token_id, newline} & set(written):
            p_V = 0
            for adapter, prompt, share in prompts:
                with lw.Composer(model, [adapter]).activate({adapter.name: 1.0}), torch.no_grad():
                    logits = model(torch.tensor([tokenizer(prompt)["input_ids"] + written])).logits
                p_V = p_V + share * logits[0, -1].double().softmax(-1)
            written.append(int(p_V.argmax()))
        said = tokenizer.decode([token for token in written if token != newline], skip_special_tokens=True)
        assert found.predict([text], max_new_tokens=4) == [said.strip()]


def test_the_loss_of_an_average_is_the_mean_of_its_members_also_of_the_program(found):
    each = [member.losses() for member in found.members.values()]
    assert found.losses() == pytest.approx([(a + 3 * b + 3 * c) / 7 for a, b, c in zip(*each, strict=True)])


def test_a_composition_with_a_program_is_kept_whole(found, trained_letters, tokenizer, letter_hub, tmp_path):
    found.save_pretrained(tmp_path / "kept")
    letter_hub.save_composition("both", found)
    stored = letter_hub.composition("both").write(tmp_path / "stored")
    for folder in (tmp_path / "kept", stored):
        read = lw.Composition.from_pretrained(folder, trained_letters[0], tokenizer)
        assert list(read.members["program"].steps) == ["one", "two"]
        assert read.predict(["a", "d", "e"]) == found.predict(["a", "d", "e"])
        assert read.losses() == pytest.approx(found.losses(), rel=1e-4)
        assert read.mean_weights == pytest.approx(found.mean_weights)


def test_a_program_has_no_adapter_and_says_what_has(found, letter_hub, tmp_path):
    program = found.members["program"]
    letter_hub.save_composition("steps", program)
    for act in (
        lambda: program.adapter,
        lambda: program.weights,
        lambda: program.export(tmp_path / "out"),
        lambda: program.prune(),
        lambda: program.tune(1),
        lambda: program.activate().__enter__(),
    ):
        with pytest.raises(ScopeError, match=r"the program one > two cannot .*composition.steps.*docs/programs"):
            act()
    with pytest.raises(ScopeError, match=r"gradient and few_shot and program cannot .*members\['few_shot'\]"):
        _ = found.adapter
    with pytest.raises(ScopeError, match="@steps has the steps one and two, which answer apart"):
        lw.parse("@steps").merge(letter_hub)
    assert program.steps["two"].adapter.hash == letter_hub["two"].hash
    assert program.mean_weights == {"one": 0.5, "two": 0.5}


def test_a_program_far_above_what_learned_nothing_is_left_out(compose, monkeypatch):
    monkeypatch.setattr(ways, "FAR", 1e-9)
    found = compose()
    assert list(found.members) == ["gradient", "few_shot"]
    assert "program one > two was left out: its loss is" in found.report.reason
    assert found.report["program"].loss is not None


def test_programs_are_sought_where_they_can_answer(compose, letter_hub, monkeypatch):
    def rows(**options):
        return {row.name for row in compose(**options).report.rows}

    assert "program" not in rows(budget=39)
    labels = lw.Task(EXAMPLES, labels=["i", "j", "k", "l"])
    assert "program" not in {row.name for row in compose_of(compose, task=labels).report.rows}
    assert "program" not in {row.name for row in compose_of(compose, hub=letter_hub.pool(["one", "two"])).report.rows}
    monkeypatch.setattr(ways, "NEAR", 100.0)
    assert "program" not in rows()


def compose_of(compose, task=None, hub=None):
    model, tokenizer, own_hub, own_task = compose.args
    return lw.compose(model, tokenizer, hub or own_hub, task or own_task, progress=False)


def test_a_hub_without_descriptions_has_no_programs(compose, letter_hub):
    for name in ("one", "two", "nothing"):
        letter_hub.update(name, description="")
    assert "program was left out: none of the 3 adapters found" in compose().report.reason


def test_with_many_examples_the_program_is_compared_on_those_held_out(compose, monkeypatch):
    monkeypatch.setattr(settings, "MANY", 4)
    found = compose()
    assert list(found.steps) == ["one", "two"]
    assert found.report.chosen == "program"
    assert found.predict(["c"]) == ["k"]
    held_out = {row.name: row.held_out_loss for row in found.report.rows}
    assert held_out["program"] == min(held_out.values())


def test_with_folds_each_fold_looks_for_a_program_of_its_own(compose):
    found = compose(folds=2)
    assert found.report["program"].held_out_hits == 1.0
    assert found.report["program"].evaluations > compose().report["program"].evaluations


def test_a_program_of_one_step_is_no_member_since_its_weight_is_learned(compose, monkeypatch):
    monkeypatch.setattr(ways, "SURE", 0.0)
    monkeypatch.setattr(ways, "NEAR", 0.0)
    found = compose_of(compose, task=lw.Task(list(zip("efgh", "ijkl", strict=True)), instruction="go on and on"))
    assert list(found.members) == ["gradient", "few_shot"]
    assert "program two was left out: it has one step" in found.report.reason


def test_the_base_alone_is_no_program_and_raises_nothing(compose, monkeypatch):
    best = ProgramSearch._chosen
    monkeypatch.setattr(ProgramSearch, "_chosen", lambda search: best(search) and (search.first[-1],))
    found = compose()
    assert list(found.members) == ["gradient", "few_shot"]
    assert "program (base) was left out: it has one step" in found.report.reason
