"""What compose() refuses before it looks at the model: none is given here."""

from __future__ import annotations

import math

import pytest
import torch

import loraweave as lw
from loraweave.errors import InvalidTask, LoraweaveError, UnknownName, WeightingError
from loraweave.types import Factors

TASK = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")])


@pytest.fixture
def pool():
    return lw.ExpertPool([lw.Adapter(name, "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))}) for name in "ab"])


@pytest.mark.parametrize("method", ["auto", "gradient", "lorahub"])
def test_seconds_are_refused_in_several_processes_before_anything_runs(pool, monkeypatch, method):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WeightingError, match=r"2 processes were launched, .* with seconds=8: give a budget"):
        lw.compose(None, None, pool, TASK, method=method, seconds=8.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "entropi"}, UnknownName, "did you mean 'entropy'"),
        ({"objective": "entropi", "method": "base"}, UnknownName, "did you mean 'entropy'"),
        ({"objective": "labels"}, InvalidTask, "this task has none"),
        ({"objective": "labels", "method": "auto"}, InvalidTask, "this task has none"),
        ({"budget": -1}, WeightingError, r"compose\(\) got budget=-1; it takes a whole number of at least 1 or None"),
        ({"budget": 0, "method": "best_single"}, WeightingError, "got budget=0"),
        ({"budget": -1, "method": "phatgoose"}, WeightingError, "got budget=-1"),
        ({"budget": 2.5}, WeightingError, "got budget=2.5"),
        ({"budget": None}, WeightingError, "budget of evaluations, or of seconds"),
        ({"seconds": -1.0}, WeightingError, "got seconds=-1.0; it takes a finite number above 0"),
        ({"seconds": math.nan}, WeightingError, "got seconds=nan"),
        ({"l1": -1.0}, WeightingError, "got l1=-1.0"),
        ({"sparsity": math.inf}, WeightingError, "got sparsity=inf"),
        ({"sigma": -1.0}, WeightingError, "got sigma=-1.0"),
        ({"population": None}, WeightingError, "got population=None"),
        ({"sigma": None}, WeightingError, "got sigma=None"),
        ({"groups": "q"}, WeightingError, "got groups='q'; it takes a mapping"),
        ({"start": "best_singl"}, UnknownName, "did you mean 'best_single'"),
        ({"start": 5}, WeightingError, "start is 5"),
        ({"start": "retrieval"}, WeightingError, "needs a hub"),
        ({"method": "gradient", "objective": "exact_match"}, WeightingError, "there are no gradients of 'exact_match'"),
        ({"method": "gradient", "space": "factors"}, WeightingError, "no gradients of .* in space 'factors'"),
        ({"method": "gradient", "betas": 0.9}, WeightingError, "options of method 'gradient'"),
        ({"method": "grid", "strengths": 3}, WeightingError, "options of method 'grid'"),
        (
            {"method": "gradient", "objective": "entropy", "inputs": "abc"},
            InvalidTask,
            "the inputs: got the text 'abc' alone",
        ),
        ({"method": "gradient", "objective": "entropy", "inputs": []}, InvalidTask, r"inputs are \[\]"),
        ({"method": "gradient", "objective": "entropy", "inputs": ["a", 5]}, InvalidTask, "input 2 is 5, not a text"),
        (
            {"method": "manual", "weights": [1.0, 2.0]},
            WeightingError,
            r"got weights=\[1.0, 2.0\]; it takes a mapping of names to values",
        ),
        ({"checkpoint": 5}, WeightingError, "checkpoint is 5"),
        ({"method": 5}, WeightingError, "method is 5"),
        ({"method": "lorahub2"}, UnknownName, "did you mean 'lorahub'"),
        ({"space": "factor"}, UnknownName, "did you mean 'factors'"),
        ({"merge_method": "tis"}, UnknownName, "did you mean 'ties'"),
        ({"merge_method": "ties", "space": "deltas"}, WeightingError, "both say what weights mean"),
        ({"method": "gradient", "merge_method": "ties"}, WeightingError, "no gradients of .* through merge method 'ties'"),
        ({"method": "arrow", "merge_method": "ties"}, WeightingError, "leave merge_method out"),
        ({"k": 0}, WeightingError, "got k=0"),
        ({"folds": 1}, WeightingError, "folds is 1"),
        ({"sigma": "big"}, WeightingError, "got sigma='big'; it takes a finite number"),
        ({"method": "gradient", "lr": "0.1"}, WeightingError, "got lr='0.1'"),
        ({"seconds": "2"}, WeightingError, "got seconds='2'"),
        ({"l1": "none"}, WeightingError, "got l1='none'"),
        ({"objective": 5}, WeightingError, "objective is 5"),
        ({"seed": -1}, WeightingError, "got seed=-1"),
        ({"seed": None}, WeightingError, "got seed=None"),
        ({"sigmma": 1}, WeightingError, "no option 'sigmma'"),
        ({"method": "manual"}, WeightingError, "takes weights="),
        ({"weights": {"a": 1.0}}, WeightingError, "no other method does"),
        ({"method": "similarity"}, WeightingError, "needs a hub"),
    ],
)
def test_what_can_be_checked_is_refused_before_anything_is_run(options, error, message, pool):
    with pytest.raises(error, match=message) as caught:
        lw.compose(None, None, pool, TASK, **{"method": "lorahub", **options})
    assert isinstance(caught.value, LoraweaveError)


def test_a_checkpoint_that_is_a_file_is_refused(pool, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WeightingError, match="is a file"):
        lw.compose(None, None, pool, TASK, checkpoint=tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adapters", r"pass lw.Hub\('adapters'\)"),
        (None, "a list of adapters"),
        ([], "empty"),
        (["a"], "'a'"),
        (5, "a list of adapters"),
    ],
)
def test_what_is_no_hub_and_no_adapters_is_refused_with_the_way_out(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightingError, match=message):
        lw.compose(None, None, given, TASK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", [[("a", "b"), ("c", "d")], "sort", None])
def test_what_is_no_task_is_refused_with_the_way_out(task, pool):
    with pytest.raises(InvalidTask, match=r"give lw.Task"):
        lw.compose(None, None, pool, task)


def test_a_list_of_adapters_is_a_pool(tiny_llama, tokenizer, make_adapters):
    adapters = make_adapters(tiny_llama, "llama")
    task = lw.Task([("a", "ab"), ("b", "ba")])
    found = [
        lw.compose(tiny_llama, tokenizer, given, task, method="uniform", progress=False)
        for given in (adapters, {adapter.name: adapter for adapter in adapters}, lw.ExpertPool(adapters))
    ]
    assert all(each.weights == pytest.approx(dict.fromkeys("abc", 1 / 3)) for each in found)
    assert found[0].losses() == found[1].losses() == found[2].losses()
