"""What holds for every way of training tasks one after the other."""

from __future__ import annotations

import joblib
import pytest
import torch

import loraweave as lw
from loraweave.common.spread import processes_here
from loraweave.errors import TrainingError, UnknownName
from loraweave.extensions.continual.course import Course

NEEDED = {"gs_lora": {"retain": [("x", "y"), ("y", "z"), ("z", "u")]}}
WAYS = lw.names("continual")


@pytest.fixture
def train(course):
    """train("ilora"): a course by that way, with the options that it needs."""

    def run(way, **settings):
        given = {name: settings.pop(name) for name in ("tasks", "model") if name in settings}
        return course(way, **given, settings={"options": NEEDED.get(way, {}), **settings})

    return run


@pytest.fixture
def begin(tiny_llama, make_adapter):
    return make_adapter(tiny_llama, "begin", rank=3, seed=4)


def test_there_are_the_ways_of_the_docs():
    assert WAYS == ["construct_vl", "gs_lora", "ilora", "inflora", "sequential", "task_arithmetic"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.own_models
def test_each_task_has_an_adapter_that_mixes_like_any_other(train, way, tiny_llama, tasks):
    found = train(way)
    assert list(found) == list(tasks)
    last = found["count"]
    assert last.card["recipe"]["continual"] == way
    assert last.card["recipe"]["after"] == list(tasks)
    engine = lw.Composer(tiny_llama, found)
    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        base = tiny_llama(input_ids=ids).logits
        with engine.activate({"count": 1.0}):
            live = tiny_llama(input_ids=ids).logits
        with engine.fused({"count": 1.0}):
            fused = tiny_llama(input_ids=ids).logits
    assert torch.allclose(live, fused, atol=1e-4)
    assert not torch.allclose(live, base, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.own_models
def test_the_base_is_left_as_it_was(train, way, tiny_llama):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    train(way)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_llama.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_llama.parameters())
    hooks = [hook for m in tiny_llama.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    # transformers leaves inert ones of its own on a model that was once asked for its hidden states
    assert [hook.__name__ for hook in hooks if hook.__name__ != "output_capturing_hook"] == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "targets"), [("t5", ("q", "v", "wo")), ("gpt2", ("c_attn",))])
def test_encoder_decoders_and_transposed_weights_are_trained_too(train, way, kind, targets, make_model):
    model = make_model(kind)
    before = train(way, model=model, target_modules=targets, lr=1e-30)
    after = train(way, model=model, target_modules=targets)
    moved = [
        layer for layer in after["count"].layers if not torch.equal(*(a["count"].delta(layer) for a in (before, after)))
    ]
    assert moved == list(after["count"].layers)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.own_models
def test_without_a_step_worth_the_name_every_model_is_the_start(train, way, begin):
    for start in ({}, {"upper": begin}):
        for adapter in train(way, start=start, lr=1e-30).values():
            for layer in adapter.layers:
                expected = begin.delta(layer) if start else torch.zeros(())
                assert torch.allclose(adapter.delta(layer), expected, atol=1e-5)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.own_models
def test_a_course_killed_in_its_last_task_resumes_to_the_same_bits(train, way, tmp_path, monkeypatch):
    whole = train(way, jobs_per_batch=1)
    original, runs = Course.run, []

    def killed_in_the_third(self, jobs, *arguments, **options):
        runs.append(jobs.jobs)
        if len(runs) == 3:
            raise _Killed
        return original(self, jobs, *arguments, **options)

    monkeypatch.setattr(Course, "run", killed_in_the_third)
    with pytest.raises(_Killed):
        train(way, jobs_per_batch=1, checkpoint=tmp_path)
    resumed = train(way, jobs_per_batch=1, checkpoint=tmp_path)
    assert runs == [("upper",), ("double",), ("count",), ("count",)]
    assert {name: adapter.hash for name, adapter in resumed.items()} == {name: a.hash for name, a in whole.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.own_models
def test_another_order_of_earlier_tasks_is_another_course(train, way, tmp_path, tasks):
    first = train(way, checkpoint=tmp_path)
    swapped = {name: tasks[name] for name in ("double", "upper", "count")}
    second = train(way, tasks=swapped, checkpoint=tmp_path)
    assert {n: a.hash for n, a in second.items()} == {n: a.hash for n, a in train(way, tasks=swapped).items()}
    assert first["upper"].hash != second["upper"].hash


@pytest.mark.parametrize("way", WAYS)
def test_an_option_that_a_way_does_not_have_is_named_before_the_first_step(train, way):
    with pytest.raises(TrainingError, match=f"'{way}' has no option 'wieght'"):
        train(way, options={"wieght": 1.0})


@pytest.mark.parametrize(
    ("way", "options", "message"),
    [
        (
            "task_arithmetic",
            {"weight": -1.0},
            "'task_arithmetic' got weight=-1.0; it takes a finite number of at least 0 and at most 2",
        ),
        ("task_arithmetic", {"tuning_steps": 3}, "exemplars is 0: give at least 1"),
        ("ilora", {"decay": 1.5}, "got decay=1.5"),
        ("ilora", {"reservoir": 0}, "got reservoir=0"),
        ("inflora", {"energy_first": True}, "got energy_first=True"),
        ("inflora", {"energy_first": 1.0}, "nowhere to learn in layer"),
        ("gs_lora", {}, "needs retain="),
        ("gs_lora", {"retain": [("a", "b")], "bound": float("nan")}, "got bound=nan"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(train, way, options, message):
    with pytest.raises(TrainingError, match=message):
        train(way, options=options)


def test_what_contradicts_itself_is_refused(train, begin, tasks):
    with pytest.raises(UnknownName, match="'sequental', did you mean 'sequential'"):
        train("sequental")
    with pytest.raises(TrainingError, match="'double', but tasks that are learned one after the other begin once"):
        train("sequential", start={"double": begin})
    with pytest.raises(TrainingError, match="trains on one task at a time, and 'all' is a list of tasks"):
        train("sequential", tasks={"all": [lw.Task(rows) for rows in tasks.values()]})
    with pytest.raises(TrainingError, match="got rank=0; it takes a whole number"):
        train("sequential", rank=0)


def test_one_process_trains_in_order_and_nothing_is_spread(train, monkeypatch, tasks):
    with joblib.parallel_config(n_jobs=2):
        assert processes_here(None) == 2
        assert list(train("sequential")) == list(tasks)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes were launched"):
        train("sequential")


@pytest.mark.own_models
def test_the_checkpoint_of_another_base_of_the_same_shapes_is_not_used(train, tiny_llama, tmp_path):
    train("sequential", checkpoint=tmp_path)
    with torch.no_grad():
        tiny_llama.model.layers[0].self_attn.q_proj.weight.neg_()
    again, fresh = train("sequential", checkpoint=tmp_path), train("sequential")
    assert {n: a.hash for n, a in again.items()} == {n: a.hash for n, a in fresh.items()}


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_step(train, tmp_path):
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainingError, match=r"cannot be made a folder to write in .*: name another"):
            train("sequential", checkpoint=place)
    with pytest.raises(TrainingError, match="checkpoint is 5; it must be a folder, or None"):
        train("sequential", checkpoint=5)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_the_page_on_continual_training(run_page):
    page = run_page("docs/extensions/continual.md")
    assert [adapter.rank for adapter in page["adapters"].values()] == [4, 4]
    assert [record.name for record in page["hub"].records(tags="memory")] == ["Velmar"]
    ranks = {name: adapter.rank for name, adapter in page["pool"].adapters.items()}
    assert ranks == {"start": 8, "past tense": 16, "plural": 16}
