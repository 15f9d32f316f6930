"""What version 0.1.0 saved before its modules moved still opens, and answers as it did then."""

from __future__ import annotations

import json
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loraweave as lw

FOLDER = Path(__file__).with_name("data")
_spec = spec_from_file_location("make_saved", Path(__file__).with_name("make.py"))
make = module_from_spec(_spec)
_spec.loader.exec_module(make)

EXPECTED = load_file(FOLDER / "expected.safetensors")
NOTE = json.loads((FOLDER / "expected.json").read_text())
# trainings and routers run in float32, which processors round differently; what is read from a file is compared to the bit
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# answers are in float64: each is within 5e-5 of the one that version 0.1.0 gave in float32
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def saved(tmp_path):
    """A copy, so that opening may write."""
    return Path(shutil.copytree(FOLDER, tmp_path / "saved"))


@pytest.fixture
def base(make_model):
    """The model of that time, whatever this processor makes of the seed."""
    model = make_model("llama")
    model.load_state_dict(load_file(FOLDER / "base" / "model.safetensors"), strict=False)
    model.config._name_or_path = "tiny"
    return model


@pytest.fixture
def exact(base):
    with make.in_float64(base) as model:
        yield model


@pytest.fixture
def pool(saved):
    return lw.ExpertPool([lw.Adapter.from_pretrained(saved / "adapters" / name) for name in "abc"])


def test_the_base_is_the_one_of_that_time(exact):
    torch.testing.assert_close(make.answered(exact), EXPECTED["base"], **EXACT)


def test_adapters_keep_their_content_and_their_report(saved, pool):
    assert {name: pool.adapters[name].hash for name in "bc"} == {name: NOTE["hashes"][name] for name in "bc"}
    merged = lw.Adapter.from_pretrained(saved / "adapters" / "merged")
    assert merged.hash == NOTE["hashes"]["a"]
    assert {parent["name"] for parent in merged.card["recipe"]["parents"]} == {"a", "b", "c"}


def test_a_hub_opens_with_its_rows_versions_and_bytes(saved, pool):
    with lw.Hub(saved / "hub") as hub:
        assert {record.name: record.hash for record in hub} == NOTE["hashes"]
        assert hub["a"].hash == NOTE["hashes"]["a"]
        assert hub.get("a", version=1).hash == pool.adapters["a"].hash
        assert [record.name for record in hub.records(tags="second")] == ["b"]
        assert [hit.name for hit in lw.Retriever(hub, embedder="hashing", keys=()).candidates("says c", k=1)] == ["c"]
        assert hub.verify().ok


def test_a_mixture_of_saved_adapters_answers_as_it_did(exact, pool):
    with lw.Composer(exact, pool).activate({"a": 0.5, "c": -1.0}):
        torch.testing.assert_close(make.answered(exact), EXPECTED["mixture"], **EXACT)


@pytest.mark.parametrize("name", [name for name in make.ROUTERS if name in lw.names("routers")])
def test_a_router_has_the_bits_that_it_was_saved_with(saved, pool, name):
    read = lw.router(saved / "routers" / name, pool)
    state = read.state_dict()
    prefix = f"routers.{name}."
    kept = {key.removeprefix(prefix): value for key, value in EXPECTED.items() if key.startswith(prefix)}
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[key], value) for key, value in kept.items())


@pytest.mark.parametrize("name", [name for name in make.ANSWERING if name in lw.names("routers")])
def test_a_router_answers_as_it_did(saved, exact, pool, tokenizer, name):
    with lw.Composer(exact, pool, tokenizer=tokenizer).activate(lw.router(saved / "routers" / name, pool)):
        torch.testing.assert_close(make.answered(exact), EXPECTED[f"answers.{name}"], **CLOSE)


def test_a_router_that_was_saved_with_its_pool_brings_it(saved):
    assert lw.router(saved / "routers" / "arrow").pool.names == ("a", "b", "c")


# one that is in an extension may not be installed
@pytest.mark.parametrize("name", [name for name in make.RECIPES if name in lw.names("experts")])
@torch.no_grad()
def test_an_expert_model_answers_as_it_did(saved, exact, name):
    with lw.experts(saved / "experts" / name, exact) as made:
        told = {"task": ["sums", "colours"]} if made.recipe.needs_tasks else {}
        torch.testing.assert_close(made(input_ids=make.IDS_BT, **told).logits, EXPECTED[f"experts.{name}"], **EXACT)


@pytest.mark.parametrize("name", NOTE["compositions"])
def test_a_composition_opens_with_its_report_and_weighs_as_it_did(saved, exact, pool, tokenizer, name):
    read = lw.Composition.from_pretrained(saved / "compositions" / name, exact, tokenizer)
    assert read.report.chosen == NOTE["compositions"][name]
    with lw.Composer(exact, pool, tokenizer=tokenizer).activate(read.weights):
        torch.testing.assert_close(make.answered(exact), EXPECTED[f"compositions.{name}"], **CLOSE)


def test_a_training_of_experts_whose_loss_has_changed_since_begins_anew(saved, base, pool, tokenizer):
    """The balance loss of mola was another one: what came of going on would be of neither."""
    train = make.trainings(base, tokenizer, pool)["experts"]
    with make.counted(base) as runs:
        whole = train(None)
        all_runs = runs()
        anew = train(saved / "checkpoints" / "experts")
        assert runs() == 2 * all_runs
    for key, value in whole.items():
        torch.testing.assert_close(anew[key], value, **CLOSE)


@pytest.mark.parametrize("name", ["adapters", "router", "experts-2", "search"])
def test_a_training_goes_on_from_its_checkpoint_to_what_it_would_have_come_to(saved, base, pool, tokenizer, name):
    train = make.trainings(base, tokenizer, pool)[name.partition("-")[0]]
    with make.counted(base) as runs:
        whole = train(None)
        all_runs = runs()
        resumed = train(saved / "checkpoints" / name)
        assert runs() - all_runs < all_runs
    assert resumed.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, **CLOSE)
