"""A training that was interrupted goes on, and what it keeps on its way."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraweave.common.descent import load_state
from loraweave.composer.train.progress import KeptState, TrainingProgress, TrainingSettings
from loraweave.errors import TrainingError

SCRIPT = Path(__file__).with_name("killed.py")
SETTINGS = {"steps": 14, "batch_size": 3, "evaluate_every": 3, "checkpoint_every": 5, "progress": False}


def interrupted_at(gates, pool, number):
    class Interrupted(gates):
        count = 0

        def losses(self, step):
            self.count += 1
            if self.count == number:
                raise KeyboardInterrupt
            return {}

    # a router's name is its module's
    Interrupted.__module__ = gates.__module__
    return Interrupted(pool, dropout=0.1)


def figures(router):
    return {name: value for name, value in router.report.items() if name != "seconds"}


@pytest.mark.parametrize("number", [4, 6, 12])
def test_it_goes_on_to_the_same_bits_and_the_same_report(engine, gates, pool, data, tmp_path, number):
    settings = {**SETTINGS, "evaluation": {"a": [("zyx", "q")]}}
    whole = gates(pool, dropout=0.1).fit(engine, data, **settings)
    with pytest.raises(KeyboardInterrupt):
        interrupted_at(gates, pool, number).fit(engine, data, checkpoint=tmp_path, **settings)
    # a router that was drawn anew in another process
    other = gates(pool, dropout=0.1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.0 if number < 6 else 1.0)
    other.fit(engine, data, checkpoint=tmp_path, **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert figures(other) == figures(whole)


def test_a_checkpoint_that_can_be_no_folder_is_refused_before_the_first_step(engine, gates, pool, data, tmp_path):
    (tmp_path / "file").write_text("kept")
    made = gates(pool)
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainingError, match="cannot be made a folder"):
            made.fit(engine, data, checkpoint=place, **SETTINGS)
    with pytest.raises(TrainingError, match="checkpoint is 3; it must be a folder"):
        made.fit(engine, data, checkpoint=3, **SETTINGS)
    assert made.report is None
    assert (tmp_path / "file").read_text() == "kept"


def test_a_loss_that_is_not_finite_leaves_the_state_from_which_it_went_on(engine, gates, pool, data, tmp_path):
    first = interrupted_at(gates, pool, 7)
    with pytest.raises(KeyboardInterrupt):
        first.fit(engine, data, checkpoint=tmp_path, **SETTINGS)

    class Breaks(gates):
        def losses(self, step):
            return {"own": torch.tensor(float("nan"))}

    Breaks.__module__ = gates.__module__
    second = Breaks(pool, dropout=0.1)
    with pytest.raises(TrainingError, match=r"nan at step 6 .* has the parameters after 5 steps"):
        second.fit(engine, data, checkpoint=tmp_path, **SETTINGS)
    (path,) = (tmp_path / "running").iterdir()
    kept = load_file(path)
    assert int(kept["step"]) == 5
    for number, parameter in enumerate(second.parameters()):
        assert torch.equal(parameter, kept[f"{number}.value"])


def test_a_call_that_was_finished_is_not_run_again(engine, gates, pool, data, tmp_path):
    made = gates(pool, dropout=0.1).fit(engine, data, checkpoint=tmp_path, **SETTINGS)
    again = interrupted_at(gates, pool, 1).fit(engine, data, checkpoint=tmp_path, **{**SETTINGS, "progress": True})
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("change", [{"lr": 0.01}, {"seed": 1}, {"steps": 13}])
def test_another_call_begins_at_the_beginning(engine, gates, pool, data, tmp_path, change):
    gates(pool).fit(engine, data, checkpoint=tmp_path, **SETTINGS)
    expected = gates(pool).fit(engine, data, **{**SETTINGS, **change})
    found = gates(pool).fit(engine, data, checkpoint=tmp_path, **{**SETTINGS, **change})
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_a_damaged_state_is_said_and_begun_again(engine, gates, pool, data, tmp_path, caplog):
    made = gates(pool).fit(engine, data, checkpoint=tmp_path, **SETTINGS)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = gates(pool).fit(engine, data, checkpoint=tmp_path, **SETTINGS)
    assert "is damaged" in caplog.text
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_killed_process_leaves_a_state_from_which_another_reaches_the_same_bits(tmp_path):
    spec = importlib.util.spec_from_file_location("killed", SCRIPT)
    assert spec is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    steps = 16
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(steps), "9"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    key = next(tmp_path.glob("running/mole-*.safetensors")).stem
    state = load_state(tmp_path, key)
    assert state is not None
    assert state.step == 9
    resumed = script.train(tmp_path, steps, seed=7)
    whole = script.train(tmp_path / "whole", steps, seed=0)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert figures(resumed) == figures(whole)


def test_the_norm_is_that_of_all_gradients_and_those_that_are_missing_become_0():
    parameters = [torch.ones(shape, requires_grad=True) for shape in ((3, 1), (7,))]
    parameters[0].grad = torch.tensor([[3.0], [0.0], [-4.0]])
    settings, seen = TrainingSettings(lr=0.1), {"experts_of_layers": [(0, 1)], "taught": {0, 1}}
    progress = TrainingProgress(parameters, settings, ("a", "b"), KeptState(None, ""), learner="", owner="", **seen)
    assert progress.judge(1, 0.5, {}) == 5.0
    assert torch.equal(parameters[1].grad, torch.zeros(7))
