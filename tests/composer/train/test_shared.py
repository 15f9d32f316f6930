"""Jobs that end early, successors, memory and held-out rows: against each job's training alone."""

from __future__ import annotations

import math

import pytest
import torch
from rich.progress import Progress

from loraweave.composer.model.batches import encode
from loraweave.composer.model.scoring import losses
from loraweave.composer.train import shared as shared_training
from loraweave.composer.train.adapters import train_adapters
from loraweave.composer.train.jobs import LoraJob, Pace
from loraweave.composer.train.rows import HeldOut
from loraweave.composer.train.state import JobProgress, PlannedJob
from loraweave.errors import PackageMissing, TrainingError, UnknownName
from loraweave.types import Task

TASKS = {
    "upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D"), ("e", "E")],
    "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")],
    "count": [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4")],
    "spell": [("abc", "a b c"), ("fed", "f e d"), ("no", "n o")],
}
# rows that say something else than what is trained: the loss on them rises from some step on
OPPOSITE = {"upper": [("a", "x y"), ("b", "x y")], "double": [("a", "7"), ("b", "7")]}


def train(model, tokenizer, tasks=TASKS, **options):
    settings = {"rank": 3, "steps": 12, "batch_size": 2, "lr": 2e-2, "progress": False, "jobs_per_batch": 2}
    return train_adapters(model, tokenizer, tasks, **{**settings, **options})


def judged(model, tokenizer, tasks=TASKS, **options):
    rows = {name: OPPOSITE[name] for name in tasks if name in OPPOSITE}
    return train(model, tokenizer, tasks, **{"held_out": rows, "evaluate_every": 2, "patience": 2, **options})


def test_a_job_that_leaves_does_not_change_the_loss_curves_of_the_others(tiny_llama, tokenizer):
    left, stayed = judged(tiny_llama, tokenizer), train(tiny_llama, tokenizer)
    assert left.report.jobs["upper"].steps < 12
    for name in ("count", "spell"):
        assert left.report.jobs[name].losses == pytest.approx(stayed.report.jobs[name].losses, abs=1e-5)
        for layer, factors in stayed[name].layers.items():
            assert torch.allclose(left[name].layers[layer].b_OR, factors.b_OR, atol=1e-5)


def test_a_job_that_ends_early_comes_out_as_it_does_alone(tiny_llama, tokenizer):
    together = judged(tiny_llama, tokenizer, jobs_per_batch=3)
    for name in TASKS:
        alone = judged(tiny_llama, tokenizer, {name: TASKS[name]})
        assert together.report.jobs[name].steps == alone.report.jobs[name].steps
        assert together.report.jobs[name].losses == pytest.approx(alone.report.jobs[name].losses, abs=1e-5)
        for layer, factors in alone[name].layers.items():
            assert torch.allclose(together[name].layers[layer].a_RI, factors.a_RI, atol=1e-5)
            assert torch.allclose(together[name].layers[layer].b_OR, factors.b_OR, atol=1e-5)


def test_the_place_of_a_job_that_ends_early_is_taken(tiny_llama, tokenizer, watch_steps):
    steps = watch_steps()
    found = judged(tiny_llama, tokenizer)
    shared = [len(counts) for _, counts in steps]
    ended = sum(found.report.jobs[name].steps for name in TASKS)
    assert sum(shared) == ended
    # two by two as long as any waits: one is alone for no longer than the last has left
    assert len(shared) < 24
    assert shared[0] == shared[found.report.jobs["upper"].steps] == 2


def test_the_kept_factors_are_those_of_the_lowest_held_out_loss(tiny_llama, tokenizer):
    from loraweave.composer.composer import Composer

    found = judged(tiny_llama, tokenizer, {"upper": TASKS["upper"]}, patience=None)
    report = found.report.jobs["upper"]
    assert report.steps == 12
    assert [step for step, _ in report.held_out] == [0, 2, 4, 6, 8, 10, 12]
    best = min(loss for step, loss in report.held_out if step)
    assert (report.best_step, best) in report.held_out
    assert report.best_step < 12
    task = Task(OPPOSITE["upper"])
    with Composer(tiny_llama, [found["upper"]]).activate({"upper": 1.0}):
        measured = losses(tiny_llama, tokenizer, task, OPPOSITE["upper"])
    # the mean over all tokens: each of the two targets has as many
    assert sum(measured) / 2 == pytest.approx(best, abs=1e-4)


def test_the_first_held_out_loss_is_the_base_models(tiny_llama, tokenizer):
    found = judged(tiny_llama, tokenizer, {"double": TASKS["double"]})
    expected = losses(tiny_llama, tokenizer, Task(OPPOSITE["double"]), OPPOSITE["double"])
    assert found.report.jobs["double"].held_out[0] == (0, pytest.approx(sum(expected) / 2, abs=1e-5))


def test_patience_ends_a_job_after_so_many_evaluations_without_a_lower_loss(tiny_llama, tokenizer):
    whole = judged(tiny_llama, tokenizer, {"upper": TASKS["upper"]}, patience=None).report.jobs["upper"]
    after = [loss for step, loss in whole.held_out if step]
    bests = [min(after[: end + 1]) for end in range(len(after))]
    expected = next(end for end in range(2, len(after)) if bests[end] == bests[end - 2])
    found = judged(tiny_llama, tokenizer, {"upper": TASKS["upper"]}).report.jobs["upper"]
    assert found.steps == 2 * (expected + 1) < 12
    assert found.stopped == "no lower held-out loss in 2 evaluations"
    assert [loss for step, loss in found.held_out if step] == pytest.approx(after[: expected + 1], abs=1e-6)


def test_a_share_of_the_examples_is_not_trained_on(tiny_llama, tokenizer, watch_steps):
    steps = watch_steps()
    found = train(tiny_llama, tokenizer, {"upper": TASKS["upper"]}, held_out=0.4)
    trained = {row for rows, _ in steps for row in rows}
    texts = [Task([]).prompt(text) for text, _ in TASKS["upper"]]
    rows = set(encode(tiny_llama, tokenizer, texts, [target for _, target in TASKS["upper"]]))
    assert len(rows) == 5
    assert len(trained) == 3
    assert trained < rows
    assert [step for step, _ in found.report.jobs["upper"].held_out] == [0, 10, 12]


@pytest.mark.parametrize("calls_until", [4, 7, 13, 15])
def test_training_with_successors_resumes_to_the_same_bits(
    tiny_llama, tokenizer, tmp_path, monkeypatch, calls_until, watch_steps
):
    monkeypatch.setattr(shared_training, "CHECKPOINT_STEPS", 2)
    whole = judged(tiny_llama, tokenizer)
    watch_steps(kill_at=calls_until)
    with pytest.raises(KeyboardInterrupt):
        judged(tiny_llama, tokenizer, checkpoint=tmp_path)
    resumed = judged(tiny_llama, tokenizer, checkpoint=tmp_path)
    assert {name: adapter.hash for name, adapter in resumed.items()} == {n: a.hash for n, a in whole.items()}
    assert resumed.report.jobs == whole.report.jobs
    assert not list(tmp_path.glob("running/*"))


def test_a_job_whose_adapter_was_written_but_not_its_end_is_trained_on_from_the_state(
    tiny_llama, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(shared_training, "CHECKPOINT_STEPS", 2)
    whole, original = judged(tiny_llama, tokenizer), shared_training.SharedTraining._save

    def killed_when_one_has_ended(self):
        if self.report.jobs:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(shared_training.SharedTraining, "_save", killed_when_one_has_ended)
        with pytest.raises(KeyboardInterrupt):
            judged(tiny_llama, tokenizer, checkpoint=tmp_path)
    assert list(tmp_path.glob("finished/*"))
    resumed = judged(tiny_llama, tokenizer, checkpoint=tmp_path)
    assert {name: adapter.hash for name, adapter in resumed.items()} == {n: a.hash for n, a in whole.items()}


def test_other_held_out_rows_or_another_patience_is_another_training(tiny_llama, tokenizer, tmp_path):
    one = {"upper": TASKS["upper"]}
    judged(tiny_llama, tokenizer, one, held_out=0.4, checkpoint=tmp_path)
    kept = len(list(tmp_path.glob("finished/*")))
    judged(tiny_llama, tokenizer, one, held_out=0.4, patience=3, checkpoint=tmp_path)
    judged(tiny_llama, tokenizer, one, held_out=0.2, checkpoint=tmp_path)
    train(tiny_llama, tokenizer, one, checkpoint=tmp_path)
    assert (kept, len(list(tmp_path.glob("finished/*")))) == (1, 4)


def test_the_report_counts_tokens_with_and_without_padding(tiny_llama, tokenizer, watch_steps):
    steps = watch_steps()
    report = train(tiny_llama, tokenizer, jobs_per_batch=4).report
    assert report.num_steps == 12
    seen = [rows for rows, _ in steps]
    assert report.num_tokens == sum(len(row) for rows in seen for row in rows)
    assert report.num_computed == sum(len(rows) * max(len(row) for row in rows) for rows in seen)
    assert report.padding == pytest.approx(1 - report.num_tokens / report.num_computed)
    assert report.tokens_per_second == pytest.approx(report.num_tokens / report.seconds)
    assert "upper: 12 steps; all steps" in str(report)


def test_an_adapter_says_how_its_training_ended(tiny_llama, tokenizer, tmp_path):
    from loraweave.hub.adapter import Adapter

    found = judged(tiny_llama, tokenizer, checkpoint=tmp_path)
    found["upper"].save_pretrained(tmp_path / "upper")
    told = Adapter.from_pretrained(tmp_path / "upper").card["training"]
    assert (told["steps"], told["best_step"]) == (found.report.jobs["upper"].steps, found.report.jobs["upper"].best_step)
    again = judged(tiny_llama, tokenizer, checkpoint=tmp_path)
    assert again.report.jobs == found.report.jobs
    assert again.report.num_steps == 0


def test_without_an_estimate_all_jobs_fit_and_a_limit_is_refused(tiny_llama, tokenizer, monkeypatch):
    estimated = train(tiny_llama, tokenizer)
    monkeypatch.setattr("loraweave.registry.brought", lambda part: {})
    trained = train(tiny_llama, tokenizer)
    assert {name: adapter.hash for name, adapter in trained.items()} == {n: a.hash for n, a in estimated.items()}
    assert (trained.report.estimated_bytes, trained.report.peak_bytes) == (0, None)
    with pytest.raises(PackageMissing, match="memory_bytes limits steps by an estimate"):
        train(tiny_llama, tokenizer, memory_bytes=10**9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": 2}, TrainingError, "patience is 2, but nothing is held out"),
        ({"held_out": 1.0}, TrainingError, "held_out is 1.0; it must be a share"),
        ({"held_out": True}, TrainingError, "held_out is True"),
        ({"held_out": {"uper": [("a", "A")]}}, UnknownName, "rows of 'uper', which is not a task"),
        ({"held_out": {"upper": []}}, TrainingError, "no rows of task 'upper'"),
        ({"held_out": 0.5, "patience": 0}, TrainingError, "got patience=0"),
        ({"held_out": 0.5, "evaluate_every": 1.5}, TrainingError, "got evaluate_every=1.5"),
        ({"held_out": 0.5, "tasks": {"one": [("a", "A")]}}, TrainingError, "task 'one' has one example"),
        ({"memory_bytes": 0}, TrainingError, "got memory_bytes=0"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(options, error, message, tiny_llama, tokenizer):
    with pytest.raises(error, match=message):
        train(tiny_llama, tokenizer, **options)


def begun(patience=None):
    job = LoraJob("x", {"layer": (torch.zeros(1, 3), torch.zeros(2, 1))}, scale=1.0)
    pace = Pace(steps=9, lr=0.1, batch_size=1, seed=0, warmup=0)
    return JobProgress(PlannedJob("x", lambda: job, 5, [], pace, HeldOut([], every=1, patience=patience)))


def went_on(progress, loss):
    """A step, after which all parameters are its number, and the held-out loss there."""
    progress.take_step(0.5, 3)
    with torch.no_grad():
        for parameter in progress.job.parameters():
            parameter.fill_(progress.step)
    progress.note_evaluation(loss)


@pytest.mark.parametrize(
    ("losses", "best"), [([3.0, 1.0, 2.0], 2), ([1.0, 1.0, 1.0], 1), ([math.nan, 2.0, 3.0], 2), ([2.0, math.nan, 1.0], 3)]
)
def test_the_job_ends_with_the_first_of_its_lowest_held_out_losses(losses, best):
    progress = begun()
    progress.note_evaluation(0.0)
    for loss in losses:
        went_on(progress, loss)
    report = progress.finish()
    assert (report.steps, report.best_step) == (3, best)
    assert all(bool((parameter == best).all()) for parameter in progress.job.parameters())


@pytest.mark.parametrize("patience", [None, 1])
def test_the_bar_ends_full(tiny_llama, tokenizer, patience):
    bar = Progress(disable=True)
    judged(tiny_llama, tokenizer, steps=6, patience=patience, progress=bar)
    assert [(task.completed, task.finished) for task in bar.tasks] == [(task.total, True) for task in bar.tasks]
    assert bar.tasks
