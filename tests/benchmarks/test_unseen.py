"""What is made of the answers to unseen tasks."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loraweave as lw
from benchmarks import _control
from benchmarks import _data as store
from benchmarks import _unseen_report as report
from benchmarks import _unseen_ways as ways
from benchmarks._run import RESAMPLES
from loraweave.extensions.tour import DemoTask

RELATIONS = {"first": "near", "second": "compositional", "flat": "near"}
# right answers of 10 items: (base, oracle, auto, lorahub_original, best_single, lora_examples)
RIGHT = {"first": (1, 9, 7, 3, 5, 6), "second": (0, 10, 8, 2, 1, 5), "flat": (5, 5, 5, 5, 5, 5)}
WAYS = ("base", "oracle", "auto", "lorahub_original", "best_single", "lora_examples")


@pytest.fixture
def measured():
    found = {}
    for task, counts in RIGHT.items():
        for way, count in zip(WAYS, counts, strict=True):
            without = way in report.WITHOUT_EXAMPLES
            for seed in (0,) if without else (0, 1):
                key = store.Key(task, way, 0 if without else 5, seed)
                right_N = (np.arange(10) < count).astype(np.uint8)
                found[key] = store.Measured(key, right_N, 1.25, 3.0, 2.5, {"chosen": "x"})
    return found


@pytest.fixture
def results(measured):
    return report.Results(measured, 5, RELATIONS)


def test_measurements_come_back_from_one_file_and_newer_ones_take_their_place(measured, tmp_path):
    store.write_together(measured.values(), tmp_path / "unseen.json")
    (tmp_path / "out").mkdir()
    kept = store.Store(tmp_path / "out", tmp_path / "unseen.json")
    key = store.Key("first", "auto", 5, 1)
    kept.keep(store.Measured(key, np.ones(13, dtype=np.uint8), 0.5, 1.0, 1.0, {}))
    back = kept.all()
    assert back.keys() == measured.keys()
    assert back[key].right_N.tolist() == [1] * 13
    for other in measured.keys() - {key}:
        assert back[other].row() == measured[other].row()
        assert back[other].right_N.tolist() == measured[other].right_N.tolist()


def test_the_share_is_the_gain_divided_by_the_oracles_where_the_oracle_gains(results):
    assert report.gaining(results) == (["first", "second"], ["flat"])
    shares = report.share_draws(results, "auto", ["first", "second"])
    assert shares["first"][0] == pytest.approx((0.7 - 0.1) / (0.9 - 0.1))
    assert shares["second"][0] == pytest.approx(0.8)
    assert len(shares["first"]) == RESAMPLES + 1


def test_ways_that_are_compared_share_the_drawn_items(results):
    draws_RW = results.draws_RW("first", ["base", "lora_examples", "auto"])
    # item by item auto is right wherever the others are, so it is in every draw
    assert bool((draws_RW[:, 2] >= draws_RW[:, 1]).all())
    assert bool((draws_RW[:, 1] >= draws_RW[:, 0]).all())
    assert draws_RW[1:, 2].std() == pytest.approx(np.sqrt(0.7 * 0.3 / 10), rel=0.1)


def test_the_report_says_which_goals_are_reached(measured):
    tables = report.report(measured, "unseen", RELATIONS)
    goals = dict(tables["unseen, 5 examples, goals"].rows)
    # lora_examples has .6, .4 and .5 of the items, the best of the rivals' means
    assert goals["above the best rival, lora_examples, by .04"].startswith(f"{(0.1 + 0.3 + 0) / 3:.3f} [")
    assert goals["above lora_examples by .10"].startswith(f"{(0.1 + 0.3 + 0) / 3:.3f} [")
    assert goals["takes at most its processor time"] == "1.00 times (2.5 s against 2.5 s)"
    assert goals["80 % of the oracle's summed gains"].startswith("78% [")
    assert goals["below the best of base, best_single on no task"] == "none"
    lacks = {task: cells for task, *cells in tables["unseen, 5 examples, lacks"].rows}
    assert lacks["first"] == ["0.70", "auto", "0.70", "0.90", "0.00", "0.20"]
    shares = tables["unseen, 5 examples, shares"].rows
    assert "(left out: flat, oracle 0.50 against base 0.50)" in [label for label, *_ in shares]


def test_what_the_stored_adapters_add_is_the_way_less_the_same_way_over_a_control(measured):
    for task, count in {"first": 5, "second": 8}.items():
        for seed in (0, 1):
            key = store.Key(task, "auto+noise", 5, seed)
            measured[key] = store.Measured(key, (np.arange(10) < count).astype(np.uint8), 1.0, 1.0, 1.0, {"chosen": "x"})
    rows = report.report(measured, "unseen", RELATIONS)["unseen, 5 examples, stored"].rows
    assert [row[:4] for row in rows] == [
        ("auto less noise", "1 near", "0.700", "0.500"),
        ("auto less noise", "1 compositional", "0.800", "0.800"),
        ("auto less noise", "2 all", "0.750", "0.650"),
    ]
    assert rows[0][4].startswith("0.200 [")
    assert rows[1][4] == "0.000 [0.000, 0.000]"


def test_a_calibrated_way_is_the_way_itself_on_tasks_without_labels(measured):
    key = store.Key("second", "lora_examples+calibrated", 5, 0)
    measured[key] = store.Measured(key, np.ones(10, dtype=np.uint8), 1.0, 1.0, 1.0, {})
    results = report.Results(measured, 5, RELATIONS, labelled={"second"})
    means = [results.draws_RW(task, ["lora_examples+calibrated"])[0, 0] for task in RELATIONS]
    assert means == [0.6, 1.0, 0.5]


def test_a_way_is_known_without_its_form_and_its_control():
    assert [ways.plain_way(f"order+distilled{ending}") for ending in ("", "+noise", "+calibrated+shuffled")] == [
        "order+distilled"
    ] * 3
    assert ways.endings("few_shot+calibrated+noise") == ["calibrated", "noise"]


@pytest.fixture
def folders(tmp_path):
    """Two folders of adapters of one layer, whose cards say their names."""
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"A": (2, 6), "B": (5, 2)}
        tensors = {f"q.lora_{part}.weight": torch.randn(shape, generator=generator) for part, shape in shapes.items()}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / _control.WEIGHTS)
        (tmp_path / name / _control.CONFIG).write_text(name)
        (tmp_path / name / "loraweave.json").write_text(name)
    return [tmp_path / "a", tmp_path / "b"]


def test_noise_keeps_the_cards_and_the_norm_of_each_update_and_nothing_else(folders, tmp_path):
    _control.noise(folders, tmp_path / "made", 0)
    for folder in folders:
        made = tmp_path / "made" / folder.name
        old, new = (load_file(place / _control.WEIGHTS) for place in (folder, made))
        updates = [tensors["q.lora_B.weight"] @ tensors["q.lora_A.weight"] for tensors in (old, new)]
        # two roots of a sum of 30 squares in fp32
        assert float(updates[0].norm()) == pytest.approx(float(updates[1].norm()), rel=1e-5)
        cosine = torch.cosine_similarity(*(update.flatten() for update in updates), dim=0)
        assert abs(cosine) < 0.9
        assert (made / "loraweave.json").read_text() == folder.name


def test_shuffled_factors_lie_under_the_card_of_another_adapter(folders, tmp_path):
    _control.shuffled(folders, tmp_path / "made", 0)
    for folder, other in zip(folders, folders[::-1], strict=True):
        made = tmp_path / "made" / folder.name
        assert (made / "loraweave.json").read_text() == folder.name
        for name in (_control.WEIGHTS, _control.CONFIG):
            assert (made / name).read_bytes() == (other / name).read_bytes()


def test_two_passes_hand_the_first_skills_answer_to_the_second(monkeypatch):
    active = []

    class Engine:
        def __init__(self, model, adapters):
            (self.name,) = adapters

        @contextmanager
        def activate(self, weights):
            assert weights == {self.name: 1.0}
            active.append(self.name)
            yield
            active.pop()

    class Hub(dict):
        def record(self, name):
            return SimpleNamespace(name=name, description=f"do {name}")

    def predict(model, tokenizer, task, texts):
        assert (active, task.instruction) == (["plural"], "do plural")
        return [f"{text}s" for text in texts]

    def evaluate(model, tokenizer, task, pairs):
        assert (active, task.instruction) == (["upper"], "do upper")
        return pairs

    monkeypatch.setattr(ways.lw, "Composer", Engine)
    monkeypatch.setattr(ways, "predict", predict)
    monkeypatch.setattr(ways, "evaluate", evaluate)
    task = DemoTask("plural_upper", lw.Task([("a", "AS")]), [("cat", ["CATS"])], ["plural", "upper"])
    found = ways.two_passes(ways.Case(None, None, Hub(plural="plural", upper="upper"), task, [], 0, 20, 40))
    assert found.score == [("cats", ["CATS"])]


def test_a_program_that_was_found_answers_the_test_items_itself(monkeypatch):
    class Program:
        def __str__(self):
            return "plural > upper"

        def score(self, pairs):
            return [f"{text}S" for text, _ in pairs]

    def order(model, tokenizer, hub, task, **options):
        assert (task.examples, options["k"]) == ((("a", "AS"),), 20)
        return Program()

    monkeypatch.setattr(ways.lw, "order", order)
    task = DemoTask("plural_upper", lw.Task([("a", "AS")]), [("CAT", ["CATS"])], ["plural", "upper"])
    case = ways.Case(None, None, None, task, [], 0, 20, 40)
    found = ways.find(case, "order")
    assert (found.notes, case.score(found)) == ({"chosen": "plural > upper"}, ["CATS"])


def test_the_examples_come_before_the_prompt_in_context():
    task = DemoTask("t", lw.Task([("a {x}", "b"), ("c", "d")], instruction="Say it."), [], [])
    found = ways.in_context(ways.Case(None, None, None, task, [], 0, 20, 40))
    shown = "Say it.\nInput: a {x}\nOutput: b\n\nSay it.\nInput: c\nOutput: d\n\nSay it.\nInput: e\nOutput:"
    assert found.task.prompt("e") == shown


def test_a_task_on_which_auto_is_worse_is_named(measured):
    for seed in (0, 1):
        key = store.Key("first", "auto", 5, seed)
        measured[key] = store.Measured(key, np.zeros(10, dtype=np.uint8), 1.0, 1.0, 1.0, {"chosen": "x"})
    found, plain = report.Results(measured, 5, RELATIONS), ("base", "best_single")
    assert report._worse(found, "first", plain).startswith("first -0.50 [")
    assert report._worse(found, "second", plain) == ""


def test_the_map_of_where_a_hub_pays_compares_with_the_best_way_without_one(measured):
    def add(task, way, count, shots=5):
        for seed in (0, 1) if shots else (0,):
            key = store.Key(task, way, shots, seed)
            right_N = (np.arange(10) < count).astype(np.uint8)
            measured[key] = store.Measured(key, right_N, 1.0, 3.0, 4.0, {"chosen": "x"})

    for task in RELATIONS:
        add(task, "in_context", 7)
        add(task, "auto+noise", 4)
    add("second", "instruction_and_inputs", 6, shots=0)
    add("second", "instruction_and_inputs+noise", 1)
    table = report.report(measured, "unseen", RELATIONS)["unseen, where a hub pays"]
    by_situation = {row[0]: list(row[1:]) for row in table.rows}
    assert list(by_situation) == ["no example, two skills joined", "5 examples, two skills joined", "5 examples, one skill"]
    # in context has 7 of 10, lora_examples 5; auto 8, over noise 4; processor time 2.5 and 4 s
    joined = by_situation["5 examples, two skills joined"]
    assert joined[:6] == ["1", "0.000", "0.700 (in_context)", "0.800", "0.400", "1.000"]
    assert (joined[6].split()[0], joined[7].split()[0], joined[8:]) == ("0.100", "0.400", ["2", "4"])
    nothing = by_situation["no example, two skills joined"]
    assert nothing[:5] == ["1", "0.000", "0.000 (base)", "0.600", "0.100"]
