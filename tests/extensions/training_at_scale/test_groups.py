"""Groups of jobs that workers train, into a hub and without one: the bits of one process."""

from __future__ import annotations

import joblib
import pytest
import torch
from watched_steps import watch_steps as watch_steps

import loraweave as lw
from loraweave.composer.train.adapters import train_adapters
from loraweave.errors import AdapterExists, BaseModelMismatch, TrainingError

TASKS = {
    "upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D"), ("e", "E")],
    "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")],
    "count": [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4")],
    "same": [("ab", "ab"), ("cd", "cd"), ("e", "e")],
}
SETTINGS = {"rank": 2, "steps": 3, "batch_size": 2, "jobs_per_batch": 2, "progress": False}


def train(base, tasks=TASKS, **options):
    return train_adapters(*base, tasks, **{**SETTINGS, **options})


def hashes(adapters):
    return {name: adapter.hash for name, adapter in adapters.items()}


@pytest.fixture(scope="module")
def alone(base):
    return train(base)


def test_groups_in_one_process_have_the_bits_and_the_report_of_jobs_that_share_steps(base, alone):
    grouped = train(base, n_jobs=1)
    assert hashes(grouped) == hashes(alone)
    assert list(grouped) == list(TASKS)
    assert grouped.report.jobs == alone.report.jobs
    counts = ("num_tokens", "num_computed", "num_steps", "estimated_bytes")
    assert [getattr(grouped.report, count) for count in counts] == [getattr(alone.report, count) for count in counts]


@pytest.mark.usefixtures("warm_workers")
def test_two_processes_train_into_a_hub_the_adapters_of_one_process(base, alone, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub, joblib.parallel_config(n_jobs=2):
        trained = train(base, hub=hub)
        assert sorted(record.name for record in hub) == sorted(TASKS)
        assert hashes(trained) == hashes(alone) == {record.name: record.hash for record in hub}
        assert {record.base_model for record in hub} == {base[0].name_or_path}
        assert trained.report.jobs == alone.report.jobs


def test_what_the_hub_has_of_the_same_training_is_not_trained_again(base, tmp_path, watch_steps):
    with lw.Hub(tmp_path / "hub") as hub:
        first = {name: TASKS[name] for name in ("upper", "double")}
        train(base, first, hub=hub)
        steps = watch_steps()
        assert hashes(train(base, first, hub=hub)) == {record.name: record.hash for record in hub}
        assert steps == []
        with pytest.raises(AdapterExists, match="the name stands for another adapter"):
            train(base, first, hub=hub, steps=4)
        assert len(steps) == 4


def test_a_group_of_which_a_part_is_missing_is_trained_whole_again(base, alone, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        train(base, hub=hub)
        hub.remove("double")
        assert hashes(train(base, hub=hub)) == hashes(alone)
        assert all(record.version == 1 for record in hub)


def test_a_failed_group_is_named_after_the_others_have_ended(base, tmp_path, monkeypatch):
    from loraweave.extensions.training_at_scale import groups

    plain = groups._train_group

    def fail(base, options, hub, group):
        if "count" in group[1]:
            raise TrainingError("the loss is not finite")
        return plain(base, options, hub, group)

    monkeypatch.setattr(groups, "_train_group", fail)
    with lw.Hub(tmp_path / "hub") as hub:
        with pytest.raises(TrainingError, match="not finite") as raised:
            train(base, hub=hub, jobs_per_batch=1)
        assert sorted(record.name for record in hub) == ["double", "same", "upper"]
    assert raised.value.__notes__ == ["this was piece 'count' of 4; the same call runs what failed again"]


def test_held_out_rows_and_starts_go_with_their_tasks(base, alone):
    options = {"held_out": {"upper": [("f", "F")], "count": [("five", "5")]}, "evaluate_every": 1}
    options["start"] = {"same": alone["same"]}
    assert hashes(train(base, n_jobs=1, **options)) == hashes(train(base, **options))


def test_a_base_that_workers_cannot_load_is_refused(tiny_llama, tokenizer):
    with pytest.raises(BaseModelMismatch, match="workers load the base model by its name, but 'tiny' cannot"):
        train((tiny_llama, tokenizer), n_jobs=1)


def test_a_base_that_changed_since_it_was_loaded_is_refused_by_the_worker(base):
    from loraweave.hub import base_reference

    changed, tokenizer = lw.load_base(base[0].name_or_path)
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1e-6
    reference = base_reference.BaseReference.of(changed, tokenizer)
    with pytest.raises(BaseModelMismatch, match="is not the one at hand"):
        base_reference._loaded(reference)
    known = base_reference.BaseReference.of(*base)
    model, _ = base_reference._loaded(known)
    assert all(torch.equal(tensor, base[0].state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_hub_is_refused(base):
    with pytest.raises(TrainingError, match="pass a Hub that takes the adapters"):
        train(base, hub="folder")
