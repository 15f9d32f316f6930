"""The real base model and the pool that ships with the repository."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loraweave as lw
from loraweave.composer.model.scoring import evaluate
from loraweave.extensions.tour import load_task, read_rows
from loraweave.hub.base import fingerprint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FOLDERS = sorted(path for path in (EXAMPLES / "pool").iterdir() if path.is_dir())

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")]


@pytest.fixture(scope="module")
def base():
    return lw.load_base()


@pytest.fixture(scope="module")
def adapters():
    return {folder.name: lw.Adapter.from_pretrained(folder) for folder in FOLDERS}


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pool_has_an_adapter_for_each_of_the_33_tasks_and_is_small(adapters):
    manifest = json.loads((EXAMPLES / "data" / "MANIFEST.json").read_text())["groups"]["pool"]
    assert set(adapters) == {entry["task"] for entry in manifest}
    assert len(adapters) == 33
    assert sum(path.stat().st_size for folder in FOLDERS for path in folder.iterdir()) <= 40e6


def test_every_adapter_was_made_on_this_base(adapters, base):
    found = fingerprint(base[0])
    assert all(adapter.fingerprint and not adapter.fingerprint.differs(found) for adapter in adapters.values())


def test_every_card_says_what_it_is_and_how_it_came_about(adapters):
    for adapter in adapters.values():
        card = adapter.card
        assert len(card["examples"]) == 20
        assert card["description"]
        assert card["data_license"]
        assert card["recipe"]["seed"] == 0
        assert {"test", "train", "zero_shot_test"} <= set(card["scores"])


def test_data_without_a_licence_are_not_in_the_repository(adapters):
    without = {"sentiment_movie", "sentiment_tweet", "emotion", "question_type"}
    assert not [name for name in without if (EXAMPLES / "data" / "pool" / f"{name}.jsonl").exists()]
    assert not (EXAMPLES / "data" / "unseen" / "sentiment_product.jsonl").exists()
    assert all("written for this card" in adapters[name].card["note"] for name in without)


@pytest.mark.parametrize(("name", "count"), [("past_tense", None), ("passive", 40)])
def test_the_score_in_a_card_is_measured_again(name, count, adapters, base):
    model, tokenizer = base
    rows = read_rows(EXAMPLES / "data" / "pool" / f"{name}.jsonl")
    test = [(row["input"], row["target"]) for row in rows if row["split"] == "test"][:count]
    task = lw.Task([], instruction=rows[0]["definition"])
    with lw.Composer(model, [adapters[name]]).activate({name: 1.0}):
        score = evaluate(model, tokenizer, task, test)
    recorded = adapters[name].card["scores"]["test"]["value"]
    # the card was measured in bf16; a few answers may turn
    assert score.value == pytest.approx(recorded, abs=0.05)
    assert score.value > adapters[name].card["scores"]["zero_shot_test"]["value"] + 0.5


def test_a_mixture_agrees_with_peft_in_every_way_of_carrying_it_out():
    differences = example("beside_peft").compare(EXAMPLES / "pool")
    assert len(differences) == 4
    assert all(difference < 1e-5 for difference in differences.values()), differences


def test_two_sentence_skills_add_up_to_one_that_neither_has(adapters, base):
    model, tokenizer = base
    unseen = load_task(EXAMPLES / "data", "negated_passive", 0, 12)
    engine = lw.Composer(model, [adapters["passive"], adapters["negation"]])
    scores = {}
    mixtures = {"passive": {"passive": 1.0}, "negation": {"negation": 1.0}, "both": {"passive": 0.7, "negation": 0.7}}
    for name, mixture in mixtures.items():
        with engine.activate(mixture):
            scores[name] = evaluate(model, tokenizer, unseen.task, unseen.test).value
    assert scores["both"] >= max(scores["passive"], scores["negation"]) + 0.25


def test_fusing_into_the_bf16_model_is_undone_bit_for_bit(adapters):
    model, _ = lw.load_base(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = lw.Composer(model, list(adapters.values())[:3])
    for _ in range(3):
        with engine.fused(dict.fromkeys(engine.pool.names, 0.5)):
            assert not torch.equal(
                model.state_dict()["model.layers.0.self_attn.q_proj.weight"],
                before["model.layers.0.self_attn.q_proj.weight"],
            )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_retriever_puts_related_adapters_first_for_an_unseen_task(tmp_path):
    unseen = load_task(EXAMPLES / "data", "negated_passive", 0, 1)
    with lw.Hub(tmp_path / "hub") as hub:
        for folder in FOLDERS:
            hub.add(folder)
        hits = lw.Retriever(hub).for_task(
            [text for text, _ in unseen.task.examples], description=unseen.task.instruction, k=3
        )
        assert hub.verify().ok
    assert hits[0].name == "passive"
    assert {hit.name for hit in hits} >= set(unseen.related)


def test_the_demo_answers_better_than_the_base_model(tmp_path):
    command = [sys.executable, "-m", "loraweave", "demo", "--num-test", "10", "--k", "8", "--budget", "20", "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1200, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    figures = json.loads(finished.stdout)
    chosen = figures["scores"][figures["chosen"]]
    assert chosen["value"] > figures["scores"]["base"]["value"]
    assert chosen["loss"] < figures["scores"]["base"]["loss"]
