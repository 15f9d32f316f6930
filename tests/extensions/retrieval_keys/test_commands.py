"""`loraweave hub train-encoder`, on a tiny encoder."""

import json

import pytest
import torch
from command_line import call

import loraweave as lw
from loraweave.extend.hubs import sentence
from loraweave.types import Factors

INPUTS = {"count": ["1 2 3", "4 5 6", "7 8 9"], "vowels": ["a e i", "o u a", "e i o"]}


@pytest.fixture
def inputs(here, tiny_encoder, monkeypatch):
    # the default one takes minutes
    whole = sentence.Sentence
    monkeypatch.setattr(sentence, "Sentence", lambda folder=None: whole(folder=folder or tiny_encoder))
    with lw.Hub("adapters") as opened:
        for number, (name, texts) in enumerate(INPUTS.items(), start=1):
            layers = {"q_proj": Factors(torch.full((1, 3), float(number)), torch.ones(2, 1))}
            opened.add(lw.Adapter(name, "tiny", layers), examples=texts)
    return here


def test_an_encoder_is_trained_on_the_hub_and_searches_it(inputs):
    done = call("hub", "train-encoder", "encoder", "--steps", 2, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["tasks"], told["id"]) == (sorted(INPUTS), sentence.Sentence(folder="encoder").id)
    found = json.loads(call("hub", "search", "7 8 9", "--encoder", "encoder", "--json").stdout)
    assert (found[0]["name"], found[0]["evidence"]) == ("count", "sample input '7 8 9' (1.00)")


def test_settings_of_the_training_come_from_the_flags(inputs):
    call("hub", "train-encoder", "encoder", "--steps", 2, "--seed", 3, "--lr", "0.001", "--checkpoint", "state")
    recipe = json.loads((inputs / "encoder" / "encoder.json").read_text())["recipe"]
    assert (recipe["steps"], recipe["seed"], recipe["lr"]) == (2, 3, 0.001)
    assert (inputs / "state" / "recipe.json").is_file()


def test_a_folder_that_holds_something_is_one_line_of_stderr(inputs):
    done = call("hub", "train-encoder", "adapters", "--steps", 1)
    assert done.exit_code == 1
    assert done.stderr.startswith("TrainingError: adapters is a file, or a folder that holds something")
