"""Expert models that share passes, against each one's own forward and training."""

from functools import partial

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.composer.experts.together import ExpertJob, train_experts
from loraweave.composer.model.batches import batch, encode, token_losses
from loraweave.composer.train.jobs import SharedPass
from loraweave.composer.train.rows import TrainingRow
from loraweave.errors import TrainingError

ROWS = {"upper": [("a", "A"), ("bcd", "B")], "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")]}


@pytest.fixture
def base(make_model):
    return make_model("llama", dtype=torch.float64)


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
        ("llama", "sira", {"num_experts": 3, "top_k": 2, "expert_dropout": 0.3, "capacity": 1.0}),
        ("llama", "fedms", {"dropout": 0.4, "per_site": True}),
        ("llama", "octavius", {"dropout": 0.4, "as_released": True}),
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


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("mixture_of_loras", {}), ("loramoe", {"knowledge": ("b",), "dropout": 0.0})],
)
def test_rows_of_several_tasks_have_the_gradients_of_being_alone(base, tokenizer, trained, recipe, options):
    made = trained(lw.experts(recipe, base, tasks=("a", "b"), **options))
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


def states(jobs):
    return {name: {key: value.clone() for key, value in model.expert_state().items()} for name, (model, _) in jobs.items()}


def test_experts_of_whole_blocks_cannot_share_a_pass(base, tokenizer):
    job = (lw.experts("mixlora", base), ROWS["upper"])
    with pytest.raises(TrainingError, match="'mixlora'"):
        train_experts(base, tokenizer, {"t": job}, steps=1, progress=False)


def test_branches_cannot_share_a_pass(base, tokenizer):
    placed = {"target_modules": ("down_proj",), "task_modules": ("down_proj",)}
    branched = lw.experts("mtlora", base, tasks=("x", "y"), **placed)
    with pytest.raises(TrainingError, match="'mtlora'"):
        train_experts(base, tokenizer, {"t": (branched, ROWS["upper"])}, steps=1, progress=False)
