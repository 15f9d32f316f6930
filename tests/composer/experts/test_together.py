"""Expert models that share passes, against each one's own forward and training."""

import shutil
from functools import partial

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.composer.experts.together import ExpertJob, train_experts
from loraweave.composer.model.batches import EncodedRow, batch, encode, pad_apart, token_losses
from loraweave.composer.train import shared as shared_training
from loraweave.composer.train.jobs import LoraJob, SharedPass, range_losses
from loraweave.composer.train.rows import TrainingRow
from loraweave.errors import BudgetExceeded, InvalidTask, TrainingError, UnknownName

ROWS = {"upper": [("a", "A"), ("bcd", "B")], "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")]}
OPTIONS = {"upper": {"num_experts": (2, 3), "top_k": 2}, "double": {"num_experts": (3, 2), "top_k": 2}}


@pytest.fixture
def base(make_model):
    return make_model("llama", dtype=torch.float64)


@pytest.fixture
def models(base):
    """MoLA models whose experts and gates are no longer where they begin."""
    generator = torch.Generator().manual_seed(3)
    made = {name: lw.experts("mola", base, **options) for name, options in OPTIONS.items()}
    with torch.no_grad():
        for model in made.values():
            for parameter in model.expert_parameters().values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return made


def encoded(base, tokenizer, name):
    return encode(base, tokenizer, [text for text, _ in ROWS[name]], [target for _, target in ROWS[name]])


def alone(base, tokenizer, model, rows, task=None):
    """Loss and gradients by the expert model's own call with labels, whose targets are all tokens after the prompt."""
    model.train()
    stacked = batch(base, tokenizer, rows)
    labels_BT = torch.full_like(stacked.inputs["input_ids"], -100)
    labels_BT[:, -stacked.targets_BK.shape[1] :] = stacked.targets_BK
    logits_BTV = model(**stacked.inputs, labels=labels_BT, task=task).logits
    loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    loss = loss + sum(model.terms.values())
    parameters = [p for p in model.expert_parameters().values() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    model.eval()
    return loss.detach(), gradients


def test_the_gradients_of_expert_models_in_one_pass_are_those_of_each_alone(base, models, tokenizer):
    rows = {name: encoded(base, tokenizer, name) for name in ROWS}
    lora = LoraJob("lora", {"model.layers.1.mlp.down_proj": (torch.randn(2, 24), torch.randn(16, 2))}, 1.0)
    jobs = [ExpertJob("upper", models["upper"]), lora, ExpertJob("double", models["double"])]
    stacked = batch(base, tokenizer, [*rows["upper"], rows["double"][0], *rows["double"]])
    with SharedPass(base, jobs, [2, 1, 3]):
        losses_BK = token_losses(base, stacked)
        penalties = [job.penalty() for job in jobs]
    real_BK = stacked.targets_BK != -100
    assert penalties[0] is not None
    for job, penalty, own in zip(jobs[::2], penalties[::2], (slice(0, 2), slice(3, 6)), strict=True):
        loss = losses_BK[own].sum() / real_BK[own].sum() + penalty
        parameters = job.parameters()
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected_loss, expected = alone(base, tokenizer, models[job.name], rows[job.name])
        assert float(loss.detach()) == pytest.approx(float(expected_loss), abs=1e-9)
        assert any(gradient.abs().max() > 1e-3 for gradient in found)
        for gradient, wanted in zip(found, expected, strict=True):
            assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-9)


def test_a_job_s_losses_on_an_encoder_decoder_are_of_its_own_rows_tokens(make_model, tokenizer, trained):
    base = make_model("t5", dtype=torch.float64)
    options = {"num_experts": (3,), "balance": 1.0, "target_modules": ("q", "v")}
    jobs = [ExpertJob(name, trained(lw.experts("mola", base, **options))) for name in ("own", "other")]
    rows, longer = encoded(base, tokenizer, "double"), encode(base, tokenizer, ["abcdefg"], ["a b c d e f g"])
    for job, own in zip(jobs, (rows, longer), strict=True):
        job.take(own, 0)
    with SharedPass(base, jobs, [3, 1]):
        range_losses(base, tokenizer, [*rows, *longer], [3, 1])
        penalty = jobs[0].penalty()
    stacked = pad_apart(batch(base, tokenizer, rows))
    made = jobs[0].model.train()
    # without the base's dropout
    base.eval()
    made(**stacked.inputs, labels=stacked.targets_BK)
    torch.testing.assert_close(penalty, made.terms["balance"])


def trained_jobs(base, tokenizer, names, **options):
    made = {name: lw.experts("mola", base, seed=1, **OPTIONS[name]) for name in names}
    settings = {"steps": 5, "batch_size": 2, "lr": 1e-2, "progress": False, **options}
    report = train_experts(base, tokenizer, {name: (made[name], ROWS[name]) for name in names}, **settings)
    state = {name: {key: value.clone() for key, value in model.expert_state().items()} for name, model in made.items()}
    for model in made.values():
        model.close()
    return report, state


def test_an_expert_model_comes_out_the_same_alone_and_beside_others(base, tokenizer):
    report, together = trained_jobs(base, tokenizer, ["upper", "double"])
    assert report.num_steps == 5
    for name in ROWS:
        own, expected = trained_jobs(base, tokenizer, [name])
        assert report.jobs[name].losses == pytest.approx(own.jobs[name].losses, abs=1e-6)
        assert report.jobs[name].losses[-1] < report.jobs[name].losses[0]
        for key, value in expected[name].items():
            assert torch.allclose(together[name][key], value, atol=1e-6)


# no row has a token twice: which of two equal ones an expert has room for, the rounding would say
DISTINCT = {**ROWS, "double": [("a", "bc"), ("de", "fghi"), ("j", "kl")]}


def of_jobs(base, tokenizer, names, made):
    """States and losses of a training of these jobs, whose rows differ in length."""
    jobs = {name: (made(), DISTINCT[name]) for name in names}
    report = train_experts(base, tokenizer, jobs, steps=4, batch_size=2, lr=1e-2, progress=False)
    found = states(jobs)
    for model, _ in jobs.values():
        model.close()
    return found, {name: report.jobs[name].losses for name in names}


# whose random numbers are of tokens, of rows, and of experts and tokens
@pytest.mark.parametrize(
    ("kind", "recipe", "options"),
    [
        ("llama", "mola", {"num_experts": (2, 3), "dropout": 0.4}),
        ("llama", "mixtral", {"num_experts": 3, "noise": True, "balance": 0.1}),
        ("t5", "mola", {"num_experts": (3,), "dropout": 0.4, "balance": 1.0, "target_modules": ("q", "v")}),
    ],
)
def test_what_a_step_draws_for_a_job_is_the_same_beside_longer_rows(make_model, tokenizer, kind, recipe, options):
    base = make_model(kind, dtype=torch.float64)
    made = partial(lw.experts, recipe, base, seed=1, tokenizer=tokenizer, **options)
    together, losses = of_jobs(base, tokenizer, ["upper", "double"], made)
    for name in ROWS:
        expected, own = of_jobs(base, tokenizer, [name], made)
        assert losses[name] == pytest.approx(own[name], abs=1e-6)
        for key, value in expected[name].items():
            torch.testing.assert_close(together[name][key], value, rtol=0, atol=1e-5)


def test_held_out_rows_end_the_job_of_an_expert_model(base, tokenizer):
    rows = {"upper": [("a", "x y"), ("b", "x y")]}
    report, _ = trained_jobs(
        base, tokenizer, ["upper", "double"], steps=12, lr=5e-2, held_out=rows, evaluate_every=1, patience=1
    )
    points = [loss for step, loss in report.jobs["upper"].held_out if step]
    assert report.jobs["upper"].steps == len(points) < report.jobs["double"].steps == 12
    assert points[-1] >= points[-2] == min(points)


def test_modes_and_the_base_are_left_as_they_were(base, tokenizer):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    made = lw.experts("mola", base, **OPTIONS["upper"])
    base.train()
    train_experts(base, tokenizer, {"upper": (made, ROWS["upper"])}, steps=1, batch_size=1, progress=False)
    assert base.training
    assert not made.layers.training
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_jobs_on_what_is_no_language_model_are_refused(make_model, tokenizer):
    base = make_model("segformer")
    jobs = {"first": (lw.experts("mola", base, num_experts=(2,), target_modules=("linear_fuse",)), ROWS["upper"])}
    with pytest.raises(TrainingError, match=r"SegformerForSemanticSegmentation is not one: fit\(\) each model by itself"):
        train_experts(base, tokenizer, jobs, steps=1, progress=False)


def test_what_cannot_share_a_pass_is_refused_before_the_first_step(base, models, make_model, tokenizer):
    other = make_model("llama")
    by_task = lw.experts("moelora", base, tasks=("x", "y"), target_modules=("down_proj",))
    cases = [
        ({}, TrainingError, "no expert models"),
        ({"u": (models["upper"], [])}, TrainingError, "'u' has no examples"),
        (
            {"u": (lw.experts("mola", other, num_experts=(2,)), ROWS["upper"])},
            TrainingError,
            "'u' is an expert model of another base",
        ),
        (dict.fromkeys("uv", (models["upper"], ROWS["upper"])), TrainingError, "'u' and 'v' are one expert model"),
        ({"t": (by_task, ROWS["upper"])}, InvalidTask, "row 1 of job 't' does not say whose task it is, .* 'moelora'"),
        ({"t": (by_task, {"z": ROWS["upper"]})}, UnknownName, "job 't'.* has no task 'z'; it has 'x', 'y'"),
    ]
    for jobs, error, message in cases:
        with pytest.raises(error, match=message):
            train_experts(base, tokenizer, jobs, steps=1, progress=False)
    settings = [
        ({"steps": 0}, "got steps=0"),
        ({"lr": "fast"}, "got lr='fast'; it takes a finite number"),
        ({"memory_bytes": "all"}, "got memory_bytes='all'"),
        ({"held_out": "some"}, "held_out is 'some'; it must be a share"),
        ({"held_out": {"u": 5}}, "held_out of task 'u' is 5"),
    ]
    for setting, message in settings:
        with pytest.raises(TrainingError, match=message):
            train_experts(base, tokenizer, {"u": (models["upper"], ROWS["upper"])}, progress=False, **setting)


def test_jobs_that_are_no_models_with_examples_are_refused_by_name(base, models, tokenizer):
    made, examples = models["upper"], ROWS["upper"]
    frozen, closed = (lw.experts("mola", base, **OPTIONS["upper"]) for _ in range(2))
    frozen.requires_grad_(False)
    closed.close()
    cases = [
        (None, "no expert models to train: pass a mapping"),
        ([made], "no expert models to train: pass a mapping"),
        ({"u": made}, "job 'u' is a ExpertModel, not a pair"),
        ({"u": (base, examples)}, "job 'u' is a .* not a pair .* whose model lw.experts has made"),
        ({"u": (made, examples, 1)}, "job 'u' is a tuple, not a pair"),
        ({3: (made, examples)}, "job 3 has no text for a name"),
        ({"u": (frozen, examples)}, "requires a gradient"),
        ({"u": (closed, examples)}, "is closed"),
    ]
    for jobs, message in cases:
        with pytest.raises(TrainingError, match=message):
            train_experts(base, tokenizer, jobs, steps=1, progress=False)


def test_rows_of_several_tasks_have_the_gradients_of_being_alone(base, tokenizer, trained):
    made = trained(lw.experts("moelora", base, tasks=("a", "b")))
    rows = encoded(base, tokenizer, "double")
    owned = [TrainingRow(row.prompt, row.target, row.target, task) for row, task in zip(rows, (1, 0, 1), strict=True)]
    jobs = [ExpertJob("plain", lw.experts("mola", base, num_experts=(2, 3))), ExpertJob("double", made, task="a")]
    stacked = batch(base, tokenizer, [rows[0], *owned])
    jobs[1].take(owned, 0)
    with SharedPass(base, jobs, [1, 3]):
        losses_BK = token_losses(base, stacked)
        penalty = jobs[1].penalty()
    loss = losses_BK[1:].sum() / (stacked.targets_BK[1:] != -100).sum() + (0.0 if penalty is None else penalty)
    found = torch.autograd.grad(loss, jobs[1].parameters(), allow_unused=True)
    expected_loss, expected = alone(base, tokenizer, made, rows, ["b", "a", "b"])
    assert float(loss.detach()) == pytest.approx(float(expected_loss), abs=1e-9)
    for gradient, wanted in zip(found, expected, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-9)


def test_what_dropout_draws_follows_from_the_seed_and_the_callers_numbers_go_on(base, tokenizer, monkeypatch):
    for name in OPTIONS:
        monkeypatch.setitem(OPTIONS, name, {**OPTIONS[name], "dropout": 0.4})
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        found.append(trained_jobs(base, tokenizer, list(ROWS), seed=seed)[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert same(found[1], found[0])
    assert not same(found[2], found[0])


def test_the_tasks_that_examples_name_are_those_of_a_recipe_without(base, tokenizer):
    with lw.experts("moelora", base) as made:
        report = train_experts(base, tokenizer, {"both": (made, ROWS)}, steps=2, batch_size=2, progress=False)
        assert made.tasks == ("upper", "double")
        assert report.jobs["both"].steps == 2


def test_a_model_that_does_not_fit_into_memory_has_the_tasks_that_it_had(base, tokenizer):
    with lw.experts("moelora", base) as made:
        before = {name: value.clone() for name, value in made.expert_state().items()}
        with pytest.raises(BudgetExceeded):
            train_experts(base, tokenizer, {"both": (made, ROWS)}, steps=2, memory_bytes=1, progress=False)
        assert made.tasks == ()
        assert all(torch.equal(before[name], value) for name, value in made.expert_state().items())


def test_held_out_pairs_are_in_the_prompts_of_the_job_s_task_and_others_name_theirs(base, tokenizer):
    task = lw.Task(ROWS["double"], instruction="Say it twice.")
    jobs = {
        "double": (lw.experts("mola", base, num_experts=(2, 3)), task),
        "both": (lw.experts("moelora", base), ROWS),
    }
    held_out = {"double": [("c", "cc")], "both": {"upper": [("c", "C")]}}
    report = train_experts(base, tokenizer, jobs, steps=1, batch_size=3, held_out=held_out, progress=False)
    row = encode(base, tokenizer, [task.prompt("c")], ["cc"])
    with torch.no_grad():
        expected = token_losses(base, batch(base, tokenizer, row)).mean()
    assert report.jobs["double"].held_out[0] == (0, pytest.approx(float(expected)))
    assert len(report.jobs["both"].held_out) == 2


def test_labels_say_which_tokens_of_a_row_have_a_loss(base):
    ids, labels = [3, 9, 27, 20, 41], [-100, -100, 27, -100, 41]
    jobs = {"tokens": (lw.experts("mola", base, num_experts=(2, 3), balance=0.0), [{"input_ids": ids, "labels": labels}])}
    report = train_experts(base, None, jobs, steps=1, batch_size=1, progress=False)
    with torch.no_grad():
        log_p_TV = base(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=1)
    expected = -(log_p_TV[1, 27] + log_p_TV[3, 41]) / 2
    assert report.jobs["tokens"].losses == (pytest.approx(float(expected), rel=1e-6),)


class _Killed(Exception):
    pass


SETTINGS = {"steps": 6, "batch_size": 2, "lr": 1e-2, "jobs_per_batch": 2, "progress": False}


def three(base):
    made = {name: lw.experts("mola", base, seed=1, dropout=0.2, **OPTIONS[name]) for name in ROWS}
    made["tasks"] = lw.experts("moelora", base)
    return {name: (model, ROWS.get(name, ROWS)) for name, model in made.items()}


def states(jobs):
    return {name: {key: value.clone() for key, value in model.expert_state().items()} for name, (model, _) in jobs.items()}


def same(found, expected):
    return all(torch.equal(found[name][key], value) for name, own in expected.items() for key, value in own.items())


@pytest.fixture
def killed(monkeypatch):
    """The training, killed at the ninth of its twelve steps; what was kept is of two at a time."""
    monkeypatch.setattr(shared_training, "CHECKPOINT_STEPS", 2)
    original, calls = shared_training.range_losses, []

    def range_losses(*arguments):
        calls.append(len(arguments[3]))
        if len(calls) == 9:
            raise _Killed
        return original(*arguments)

    def training(base, tokenizer, jobs, folder):
        with monkeypatch.context() as patched:
            patched.setattr(shared_training, "range_losses", range_losses)
            with pytest.raises(_Killed):
                train_experts(base, tokenizer, jobs, checkpoint=folder, **SETTINGS)

    return training


def test_an_interrupted_training_goes_on_to_the_same_bits_with_new_models_and_with_those_that_it_left(
    base, tokenizer, killed, tmp_path
):
    whole = three(base)
    expected = train_experts(base, tokenizer, whole, **SETTINGS)
    left = three(base)
    killed(base, tokenizer, left, tmp_path)
    assert not same(states(left), states(whole))
    shutil.copytree(tmp_path, tmp_path / "copy")
    for jobs, folder in ((three(base), tmp_path), (left, tmp_path / "copy")):
        report = train_experts(base, tokenizer, jobs, checkpoint=folder, **SETTINGS)
        # eight of the twelve steps were kept
        assert report.num_steps == 4
        assert report.jobs == expected.jobs
        assert same(states(jobs), states(whole))


def test_what_was_finished_is_not_trained_again(base, tokenizer, tmp_path):
    first, again = three(base), three(base)
    report = train_experts(base, tokenizer, first, checkpoint=tmp_path, **SETTINGS)
    repeated = train_experts(base, tokenizer, again, checkpoint=tmp_path, **SETTINGS)
    assert (report.num_steps, repeated.num_steps) == (12, 0)
    assert repeated.jobs == report.jobs
    assert same(states(again), states(first))


def test_a_checkpoint_of_other_rows_rates_or_beginnings_is_not_used(base, tokenizer, tmp_path):
    jobs = {"tasks": three(base)["tasks"]}
    train_experts(base, tokenizer, jobs, checkpoint=tmp_path, **SETTINGS)
    other_task = {"upper": ROWS["double"], "double": ROWS["upper"]}
    others = [
        ({"tasks": (three(base)["tasks"][0], other_task)}, {}),
        ({"tasks": three(base)["tasks"]}, {"lr": 2e-2}),
        # trained, it begins elsewhere
        (jobs, {}),
    ]
    for own, settings in others:
        assert train_experts(base, tokenizer, own, checkpoint=tmp_path, **{**SETTINGS, **settings}).num_steps == 6


def test_a_finished_model_whose_file_is_damaged_is_trained_again(base, tokenizer, tmp_path, caplog):
    first, again = ({"tasks": three(base)["tasks"]} for _ in range(2))
    train_experts(base, tokenizer, first, checkpoint=tmp_path, **SETTINGS)
    for path in tmp_path.glob("finished/*"):
        path.write_bytes(path.read_bytes()[:50])
    assert train_experts(base, tokenizer, again, checkpoint=tmp_path, **SETTINGS).num_steps == 6
    assert "is damaged" in caplog.text
    assert same(states(again), states(first))


@pytest.mark.parametrize(
    ("own", "other"),
    [
        # the encoder has a column of padding alone, which a wider pass has not
        (EncodedRow((5, 6, 7), (8, 9, 3)), EncodedRow((5,), (8, 9, 4, 4, 3))),
        (EncodedRow((5, 6, 7), (3,)), EncodedRow((5, 9, 8, 8), (8, 4, 4, 4, 4, 3))),
    ],
)
def test_widths_that_tell_encoder_and_decoder_apart_draw_as_alone(make_model, tokenizer, trained, own, other):
    base = make_model("t5", dtype=torch.float64)
    options = {"num_experts": (3,), "balance": 1.0, "dropout": 0.5, "target_modules": ("q", "v")}
    jobs = [ExpertJob(name, trained(lw.experts("mola", base, **options))) for name in ("own", "other")]
    found = []
    for members, rows in ((jobs[:1], [own, own]), (jobs, [own, own, other, other])):
        for number, job in enumerate(members):
            job.take(rows[2 * number : 2 * number + 2], 0)
        with SharedPass(base, members, [2] * len(members)):
            loss = range_losses(base, tokenizer, rows, [2] * len(members))[0]
            penalty = jobs[0].penalty()
        found.append((loss, penalty, torch.autograd.grad(loss + penalty, jobs[0].parameters())))
    torch.testing.assert_close(found[1], found[0])
