"""Training several adapters in one batch, from new factors or given adapters: against plain autograd, and against peft."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounding import assert_near, num_terms
from torch.nn import functional

from loraweave.composer.model.batches import IGNORED, batch, encode, token_losses
from loraweave.composer.train import shared as shared_training
from loraweave.composer.train.adapters import train_adapters
from loraweave.composer.train.jobs import LoraJobs, LoraSettings, job_losses
from loraweave.composer.train.rows import PACKED_ROWS, pack_task
from loraweave.errors import (
    AdapterUnsupported,
    BaseModelMismatch,
    InvalidTask,
    LayerMismatch,
    PackageMissing,
    TrainingError,
    UnknownName,
)
from loraweave.hub.base import fingerprint
from loraweave.types import Task

TASKS = {
    "upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D"), ("e", "E")],
    "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")],
    "count": [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4")],
}
LAYERS = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.self_attn.v_proj": (8, 16)}


def train(model, tokenizer, tasks=TASKS, **options):
    settings = {"rank": 3, "steps": 6, "batch_size": 4, "lr": 1e-2, "progress": False, "jobs_per_batch": 3}
    return train_adapters(model, tokenizer, tasks, **{**settings, **options})


def rows_of(model, tokenizer, name):
    pairs = TASKS[name][:3]
    return encode(model, tokenizer, [text for text, _ in pairs], [target for _, target in pairs])


def test_the_gradients_of_a_job_are_those_of_training_it_alone(make_model, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    names = list(TASKS)
    fused = LoraJobs(model, LAYERS, names, LoraSettings(rank=3, alpha=6.0))
    with torch.no_grad():
        for index, job in enumerate(fused.members):
            for _, b_OR in job.factors.values():
                b_OR.normal_(generator=torch.Generator().manual_seed(index))
    rows = [row for name in names for row in rows_of(model, tokenizer, name)]
    with fused:
        job_losses(model, tokenizer, rows, len(names)).sum().backward()
    for index, name in enumerate(names):
        expected = _plain_lora_gradients(model, tokenizer, fused, index, rows_of(model, tokenizer, name))
        for layer, pair in fused.members[index].factors.items():
            for parameter, wanted in zip(pair, expected[layer], strict=True):
                assert torch.allclose(parameter.grad.double(), wanted, rtol=1e-5, atol=1e-7)


def _plain_lora_gradients(model, tokenizer, fused, index, rows):
    """One job alone: W + (alpha / r) B A as a dense weight, unpadded rows one at a time, autograd through the product."""
    leaves = {layer: (a.detach().double(), b.detach().double()) for layer, (a, b) in fused.members[index].factors.items()}
    for a, b in leaves.values():
        a.requires_grad_()
        b.requires_grad_()
    originals = {layer: model.get_submodule(layer).weight for layer in leaves}
    total, count = 0.0, 0
    for row in rows:
        dense = {f"{layer}.weight": originals[layer] + 2.0 * b @ a for layer, (a, b) in leaves.items()}
        ids = torch.tensor([row.prompt + row.target])
        logits = torch.func.functional_call(model, dense, kwargs={"input_ids": ids}).logits[0]
        start = len(row.prompt)
        total = total + functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
        count += len(row.target)
    (total / count).backward()
    return {layer: (a.grad, b.grad) for layer, (a, b) in leaves.items()}


def test_training_lowers_the_loss_and_gives_adapters_in_the_order_of_the_tasks(tiny_llama, tokenizer):
    from loraweave.composer.composer import Composer
    from loraweave.composer.model.scoring import losses

    adapters = train(tiny_llama, tokenizer, steps=40)
    assert list(adapters) == list(TASKS)
    engine = Composer(tiny_llama, list(adapters.values()))
    for name, examples in TASKS.items():
        before = losses(tiny_llama, tokenizer, Task(examples), examples)
        with engine.activate({name: 1.0}):
            after = losses(tiny_llama, tokenizer, Task(examples), examples)
        assert sum(after) < 0.9 * sum(before)


@pytest.mark.own_models
def test_the_base_is_left_as_it_was(tiny_llama, tokenizer):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    tiny_llama.train()
    train(tiny_llama, tokenizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_llama.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_llama.parameters())
    assert tiny_llama.training
    assert not any(module._forward_hooks for module in tiny_llama.modules())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_trained_adapter_in_peft_gives_the_logits_of_the_training_forward(tiny_llama, tokenizer, tmp_path, make_model):
    import peft

    adapter = train(tiny_llama, tokenizer)["count"]
    adapter.save_pretrained(tmp_path / "count")
    ids = torch.tensor([[5, 9, 30, 41]])
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "count").eval()
    fused = LoraJobs(tiny_llama, {}, ["count"], LoraSettings(rank=3, alpha=6.0), start={"count": adapter.layers})
    with torch.no_grad(), fused:
        assert_near(tiny_llama(input_ids=ids).logits, loaded(input_ids=ids).logits, num_terms(tiny_llama))


def test_interrupted_training_resumes_to_the_same_bits(tiny_llama, tokenizer, tmp_path, monkeypatch, watch_steps):
    monkeypatch.setattr(shared_training, "CHECKPOINT_STEPS", 2)
    whole = train(tiny_llama, tokenizer, jobs_per_batch=2)
    steps = watch_steps(kill_at=9)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_llama, tokenizer, jobs_per_batch=2, checkpoint=tmp_path)
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    resumed = train(tiny_llama, tokenizer, jobs_per_batch=2, checkpoint=tmp_path)
    # six steps of the first group and two of the second were kept: four were left
    assert len(steps) == 9 + 4
    assert {name: adapter.hash for name, adapter in resumed.items()} == {n: a.hash for n, a in whole.items()}


@pytest.mark.own_models
def test_the_checkpoint_of_another_base_of_the_same_shapes_is_not_used(tiny_llama, tokenizer, tmp_path):
    train(tiny_llama, tokenizer, checkpoint=tmp_path)
    with torch.no_grad():
        tiny_llama.model.layers[0].self_attn.q_proj.weight.neg_()
    again = train(tiny_llama, tokenizer, checkpoint=tmp_path)
    fresh = train(tiny_llama, tokenizer)
    assert {n: a.hash for n, a in again.items()} == {n: a.hash for n, a in fresh.items()}


def test_a_damaged_checkpoint_is_said_and_its_jobs_start_again(tiny_llama, tokenizer, tmp_path, caplog):
    whole = train(tiny_llama, tokenizer, checkpoint=tmp_path)
    for path in tmp_path.glob("finished/*/adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    again = train(tiny_llama, tokenizer, checkpoint=tmp_path)
    assert caplog.text.count("is damaged") == 3
    assert {n: a.hash for n, a in again.items()} == {n: a.hash for n, a in whole.items()}


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_llama, tokenizer):
    first, second, other = (train(tiny_llama, tokenizer, seed=seed)["upper"].hash for seed in (3, 3, 4))
    assert first == second != other


def test_an_adapter_carries_its_recipe_and_the_fingerprint_of_its_base(tiny_llama, tokenizer):
    adapter = train(tiny_llama, tokenizer)["upper"]
    assert adapter.card["recipe"]["lr"] == 1e-2
    assert adapter.fingerprint == fingerprint(tiny_llama)


@pytest.mark.parametrize(
    ("tasks", "options", "error", "message"),
    [
        ({}, {}, TrainingError, "no tasks"),
        ({"empty": []}, {}, TrainingError, "'empty' has no examples"),
        ({"blank": [("a", " ")]}, {}, InvalidTask, "task 'blank': example 1 .* empty target"),
        ({"upper": 5}, {}, InvalidTask, "task 'upper': the examples: got 5, not rows"),
        ({"upper": [("a", "b"), {"foo": 1}]}, {}, InvalidTask, r"task 'upper': example 2 has \['foo'\]"),
        (TASKS, {"steps": 0}, TrainingError, "got steps=0"),
        (TASKS, {"rank": 2.5}, TrainingError, "got rank=2.5; it takes a whole number of at least 1"),
        (TASKS, {"lr": float("nan")}, TrainingError, "got lr=nan"),
        (TASKS, {"target_modules": ("q_prog",)}, UnknownName, "'q_prog'.*q_proj"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(tasks, options, error, message, tiny_llama, tokenizer):
    with pytest.raises(error, match=message):
        train(tiny_llama, tokenizer, tasks, **options)


def test_a_loss_that_is_not_finite_ends_training_with_the_step_and_keeps_what_was_finished(
    tiny_llama, tokenizer, tmp_path, monkeypatch
):
    original = shared_training.range_losses
    calls = 0

    def breaks_at_the_eighth_step(*arguments):
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls == 8 else 1.0)

    monkeypatch.setattr(shared_training, "range_losses", breaks_at_the_eighth_step)
    with pytest.raises(TrainingError, match="is nan at step 2"):
        train(tiny_llama, tokenizer, jobs_per_batch=1, checkpoint=tmp_path)
    assert len(list(tmp_path.glob("finished/*"))) == 1
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_first_step(tiny_llama, tokenizer, tmp_path):
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainingError, match=r"cannot be made a folder to write in .*: name another"):
            train(tiny_llama, tokenizer, checkpoint=place)
    with pytest.raises(TrainingError, match="checkpoint is 5; it must be a folder, or None"):
        train(tiny_llama, tokenizer, checkpoint=5)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": None}, "got lr=None; it takes a finite number above 0"),
        ({"alpha": "8"}, "got alpha='8'"),
        ({"rank": None}, "got rank=None; it takes a whole number"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj'; it must be a list"),
        ({"target_modules": ()}, "must be a list"),
        ({"held_out": "some"}, "held_out is 'some'; it must be a share"),
        ({"held_out": {"upper": 5}}, "held_out of task 'upper' is 5"),
        ({"start": 5}, "start is 5; pass"),
        ({"start": {"upper": None}}, "task 'upper' cannot start from None: pass an Adapter"),
        ({"tasks": [("upper", TASKS["upper"])]}, "no tasks to train: pass a mapping"),
        ({"tasks": {5: TASKS["upper"]}}, "task 5 has no text for a name"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(tiny_llama, tokenizer, settings, message):
    with pytest.raises(TrainingError, match=message):
        train(tiny_llama, tokenizer, **settings)


@pytest.fixture
def begin(tiny_llama, make_adapter):
    """An adapter of other layers and another rank than the jobs beside it."""
    return make_adapter(tiny_llama, "begin", rank=5, targets=("q_proj", "down_proj"), seed=4)


def equal(left, right):
    return list(left) == list(right) and all(
        torch.equal(left[layer].a_RI, right[layer].a_RI) and torch.equal(left[layer].b_OR, right[layer].b_OR)
        for layer in left
    )


def test_before_the_first_step_a_job_is_the_adapter_that_it_starts_from_to_the_bit(tiny_llama, begin):
    jobs = LoraJobs(tiny_llama, LAYERS, ["new", "old"], LoraSettings(rank=3, alpha=6.0), start={"old": begin.layers})
    assert equal(jobs.layers_of("old"), begin.layers)
    assert {layer: factors.rank for layer, factors in jobs.layers_of("new").items()} == dict.fromkeys(LAYERS, 3)


@pytest.mark.parametrize("power", [2.0**11, 2.0**-11])
def test_a_job_learns_alike_from_an_adapter_whose_scale_lies_in_the_other_factor(tiny_llama, tokenizer, begin, power):
    """As in forms of 8-bit floats, where a fills the range; a power of two rounds nothing."""
    usual = {layer: replace(f, a_RI=f.a_RI / 4, b_OR=f.b_OR * 4) for layer, f in begin.layers.items()}
    norms = [float(factors.a_RI.norm(dim=1).mean()) for factors in usual.values()]
    assert all(0.5 <= norm < 1 for norm in norms)
    moved = {layer: replace(f, a_RI=f.a_RI * power, b_OR=f.b_OR / power) for layer, f in usual.items()}
    first, second = (
        train(tiny_llama, tokenizer, {"double": TASKS["double"]}, start={"double": replace(begin, layers=layers)})["double"]
        for layers in (usual, moved)
    )
    assert equal(first.layers, second.layers)


def test_the_forward_of_a_started_job_is_that_of_the_adapters_dense_update(make_model, begin, with_dense_update):
    model = make_model("llama", dtype=torch.float64)
    ids = torch.tensor([[5, 9, 30, 41], [7, 7, 12, 3]])
    jobs = LoraJobs(model, LAYERS, ["new", "old"], LoraSettings(rank=3, alpha=6.0), start={"old": begin.layers})
    with torch.no_grad(), jobs:
        found = model(input_ids=ids).logits
    expected = with_dense_update("llama", [begin], [1.0], dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(found[1], expected(input_ids=ids).logits[1], atol=1e-9)
        assert torch.allclose(found[0], model(input_ids=ids).logits[0], atol=1e-12)


@pytest.mark.own_models
def test_jobs_of_other_layers_and_ranks_get_gradients_in_their_own_factors_alone(tiny_llama, tokenizer, begin):
    jobs = LoraJobs(tiny_llama, LAYERS, ["new", "old"], LoraSettings(rank=3, alpha=6.0), start={"old": begin.layers})
    rows = encode(tiny_llama, tokenizer, ["a", "b", "c", "d"], ["A", "B", "C", "D"])
    new, old = jobs.members
    with jobs:
        token_losses(tiny_llama, batch(tiny_llama, tokenizer, rows))[2:].sum().backward()
    assert all(parameter.grad.any() for parameter in old.parameters())
    assert not any(parameter.grad.any() for parameter in new.parameters())
    assert [len(a_RI) for a_RI, _ in new.factors.values()] == [3, 3]
    assert list(old.layers) == list(begin.layers)


def test_a_started_job_comes_out_the_same_alone_and_among_others(tiny_llama, tokenizer, begin):
    together = train(tiny_llama, tokenizer, start={"double": begin})
    alone = train(tiny_llama, tokenizer, {"double": TASKS["double"]}, start={"double": begin})
    unstarted = train(tiny_llama, tokenizer, {"upper": TASKS["upper"]})
    for name, expected in (("double", alone), ("upper", unstarted)):
        assert list(together[name].layers) == list(expected[name].layers)
        for layer, factors in expected[name].layers.items():
            assert torch.allclose(together[name].layers[layer].a_RI, factors.a_RI, atol=1e-5)
            assert torch.allclose(together[name].layers[layer].b_OR, factors.b_OR, atol=1e-5)


def test_a_started_adapter_keeps_layers_and_ranks_and_says_what_it_began_from(tiny_llama, tokenizer, begin):
    found = train(tiny_llama, tokenizer, start={"double": begin})["double"]
    assert [(layer, f.rank) for layer, f in found.layers.items()] == [(layer, 5) for layer in begin.layers]
    assert found.card["recipe"]["start"] == {"hash": begin.hash, "name": "begin"}
    assert not equal(found.layers, begin.layers)


def test_folds_of_one_task_are_jobs_of_one_batch(tiny_llama, tokenizer, begin, watch_steps):
    steps = watch_steps()
    folds = {f"fold-{index}": TASKS["upper"][:index] + TASKS["upper"][index + 2 :] for index in range(3)}
    found = train(tiny_llama, tokenizer, folds, start=dict.fromkeys(folds, begin), batch_size=3, steps=2)
    assert [(len(rows), counts) for rows, counts in steps] == [(9, [3, 3, 3])] * 2
    assert len({adapter.hash for adapter in found.values()}) == 3


def test_the_checkpoint_of_one_start_is_not_that_of_another(tiny_llama, tokenizer, begin, make_adapter, tmp_path):
    other = make_adapter(tiny_llama, "begin", rank=5, targets=("q_proj", "down_proj"), seed=5)
    first, second = (train(tiny_llama, tokenizer, start={"count": a}, checkpoint=tmp_path)["count"] for a in (begin, other))
    again = train(tiny_llama, tokenizer, start={"count": begin}, checkpoint=tmp_path)["count"]
    assert first.hash == again.hash != second.hash


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0, [1.0, 0.853553, 0.5, 0.146447]), (1, [1.0, 1.0, 0.75, 0.25]), (9, [0.5, 1.0, 1.0, 0.5])]
)
def test_warm_up_takes_as_many_steps_as_asked_and_at_most_half(warmup, expected):
    recipe = LoraSettings(steps=4, lr=1.0, warmup=warmup)
    assert [recipe.rate(step) for step in range(4)] == pytest.approx(expected, abs=1e-6)


def test_a_start_that_does_not_fit_is_refused_before_the_first_step(tiny_llama, make_model, tokenizer, make_adapter, begin):
    other = make_model("llama", hidden_size=8)
    gained = make_adapter(tiny_llama, "gained", gain=True)
    rows = make_adapter(tiny_llama, "rows", targets=("q_proj",))
    words = {"model.embed_tokens": replace(next(iter(rows.layers.values())), kind="embedding", a_RI=torch.randn(3, 61))}
    cases = [
        ({"uper": begin}, UnknownName, "'uper', which is not a task; the tasks are upper"),
        ({"upper": replace(begin, fingerprint=fingerprint(other))}, BaseModelMismatch, "'begin' was made for another"),
        ({"upper": make_adapter(other, "small")}, LayerMismatch, "small"),
        ({"upper": gained}, AdapterUnsupported, "'gained': layer .* has gain_O"),
        ({"upper": replace(rows, layers=words)}, AdapterUnsupported, "is of kind 'embedding'"),
    ]
    for start, error, message in cases:
        with pytest.raises(error, match=message):
            train(tiny_llama, tokenizer, start=start)
    with pytest.raises(TrainingError, match="got warmup=-1"):
        train(tiny_llama, tokenizer, warmup=-1)


def test_a_packed_row_asks_for_each_answer_given_the_examples_before_it(tiny_llama, tokenizer):
    task = Task(TASKS["upper"], instruction="up", template="{instruction}{input}:", demonstrations=True)
    rows = pack_task(tiny_llama, tokenizer, task, seed=3)
    texts = [tokenizer.decode(row.prompt + row.target) for row in rows]
    assert len(rows) == PACKED_ROWS
    assert len(set(texts)) > 30
    for place in range(5):
        # in every order, each example stands at every place
        assert sorted(text.split("\n\n")[place].strip()[2] for text in texts[:5]) == list("abcde")
    for row in rows:
        whole = tokenizer.decode(row.prompt + row.target)
        asked = tokenizer.decode([label for label in row.labels if label != IGNORED])
        shown = [piece.strip() for piece in whole.split("\n\n")]
        assert all(piece == f"up{text}: {text.upper()}" for piece, text in zip(shown, (p[2] for p in shown), strict=True))
        assert asked.split() == [piece[-1] for piece in shown]
        assert asked.count("\n") == 5
        assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.target, strict=True))


def test_a_packed_row_shows_what_fits_into_the_context(make_model, tokenizer):
    model = make_model("gpt2")
    task = Task([(letter * 9, letter) for letter in "abcdefghij"], demonstrations=True)
    rows = pack_task(model, tokenizer, task, seed=0)
    assert len(rows) == PACKED_ROWS
    assert all(20 < len(row) <= 64 for row in rows)


def test_a_task_that_shows_its_examples_is_trained_on_packed_rows(tiny_llama, tokenizer):
    task = Task(TASKS["upper"], demonstrations=True)
    trained = train(tiny_llama, tokenizer, {"shown": task, "alone": TASKS["upper"]}, steps=1)
    assert trained.report.jobs["shown"].num_tokens > trained.report.jobs["alone"].num_tokens
    rows = pack_task(tiny_llama, tokenizer, task, seed=0)
    chosen = LoraSettings(rank=3, steps=1, batch_size=4).rows(rows, "shown", 0)
    assert trained.report.jobs["shown"].num_tokens == sum(map(len, chosen))
    held = train(tiny_llama, tokenizer, {"shown": task}, steps=1, held_out=0.2)
    assert held.report.jobs["shown"].num_tokens < trained.report.jobs["shown"].num_tokens * 4


def test_one_adapter_learns_a_list_of_tasks(tiny_llama, tokenizer):
    both = [Task(TASKS["upper"], instruction="up"), Task(TASKS["double"], instruction="double")]
    found = train(tiny_llama, tokenizer, {"all": both}, steps=1, batch_size=8)
    prompts = [task.prompt(text) for task in both for text, _ in task.examples]
    rows = encode(tiny_llama, tokenizer, prompts, [target for task in both for _, target in task.examples])
    stacked = batch(tiny_llama, tokenizer, rows)
    with torch.no_grad():
        losses_BK = token_losses(tiny_llama, stacked)
    # the first step's loss is the base's, over all answer tokens of both tasks
    expected = float(losses_BK.sum() / (stacked.targets_BK != IGNORED).sum())
    assert found.report.jobs["all"].losses[0] == pytest.approx(expected, rel=1e-5)


def test_workers_without_the_extension_that_asks_them_are_refused(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr("loraweave.registry.brought", lambda part: {})
    with pytest.raises(PackageMissing, match="n_jobs trains in groups, which none of the extensions at hand does"):
        train_adapters(tiny_llama, tokenizer, {"upper": [("a", "A")]}, progress=False, n_jobs=1)
