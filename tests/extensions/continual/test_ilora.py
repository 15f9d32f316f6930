"""I-LoRA: the slow adapter follows the fast one, earlier examples come back, hidden states do not fall behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import loraweave as lw
from loraweave.composer.model.batches import batch, encode
from loraweave.composer.train.jobs import LoraJobs, LoraSettings, job_losses
from loraweave.extensions.continual.continual import ilora as way
from loraweave.extensions.continual.course import Course
from loraweave.types import Task

LAYERS = {"model.layers.0.self_attn.q_proj": (16, 16)}


@pytest.fixture
def pair(tiny_llama):
    """A slow and a fast adapter that differ."""
    slow, fast = (LoraJobs(tiny_llama, LAYERS, ["x"], LoraSettings(rank=2, alpha=4.0, seed=seed)) for seed in (1, 2))
    for jobs in (slow, fast):
        for tensor in jobs.parameters():
            tensor.data.add_(torch.randn(tensor.shape))
    return slow, fast


def test_with_decay_0_the_slow_adapter_is_the_fast_one_and_with_1_it_stays(pair):
    slow, fast = pair
    before = [tensor.detach().clone() for tensor in slow.parameters()]
    way.follow(slow, fast, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), before, strict=True))
    way.follow(slow, fast, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), fast.parameters(), strict=True))


def test_the_slow_adapter_is_the_average_of_factors_apart(pair):
    slow, fast = pair
    expected = [0.3 * s.detach() + 0.7 * f.detach() for s, f in zip(slow.parameters(), fast.parameters(), strict=True)]
    way.follow(slow, fast, 0.3)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(slow.parameters(), expected, strict=True))


@pytest.mark.own_models
def test_a_course_follows_every_step_of_all_tasks(course, monkeypatch):
    decays = []
    original = way.follow
    monkeypatch.setattr(way, "follow", lambda slow, fast, decay: decays.append(decay) or original(slow, fast, decay))
    course("ilora", decay=0.8)
    assert decays == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4, *[0.8] * 8])


@pytest.mark.own_models
def test_with_decay_1_the_slow_adapter_is_the_mean_over_all_steps(course, monkeypatch):
    seen = []
    original = way.follow

    def noted(slow, fast, decay):
        original(slow, fast, decay)
        seen.append(([t.detach().clone() for t in fast.parameters()], [t.detach().clone() for t in slow.parameters()]))

    monkeypatch.setattr(way, "follow", noted)
    course("ilora", decay=1.0)
    for part, last in enumerate(seen[-1][1]):
        assert torch.allclose(last, torch.stack([fast[part] for fast, _ in seen]).mean(dim=0), atol=1e-6)


def test_the_consistency_loss_is_0_for_equal_adapters_and_only_counts_where_the_slow_state_is_larger(tiny_llama):
    plastic, stable = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([2.0, -3.0, 3.0, 0.5])
    assert float(way.lag(plastic, plastic)) == 0.0
    assert float(way.lag(plastic, stable)) == pytest.approx((1.0 + 0.25) / 4)


@pytest.mark.own_models
def test_hidden_states_are_those_of_real_tokens_and_do_not_see_padding(tiny_llama, tokenizer):
    rows = encode(tiny_llama, tokenizer, ["a longer prompt", "b"], ["A", "BB"])
    with torch.no_grad():
        loss, together = way.states(tiny_llama, batch(tiny_llama, tokenizer, rows))
        alone = [way.states(tiny_llama, batch(tiny_llama, tokenizer, [row]))[1] for row in rows]
        assert float(loss) == pytest.approx(float(job_losses(tiny_llama, tokenizer, rows, 1)), abs=1e-6)
    # three states: after the embeddings and after each of two blocks
    lengths = [len(row) * 16 for row in rows]
    expected = [part for n in range(3) for part in (alone[0].split(lengths[0])[n], alone[1].split(lengths[1])[n])]
    assert torch.allclose(together, torch.cat(expected), atol=1e-4)


@pytest.mark.own_models
def test_the_loss_of_a_later_task_is_the_mean_of_its_own_and_that_of_replayed_examples(
    course, tiny_llama, tokenizer, monkeypatch, tasks
):
    found, original = [], Course.run

    def first_loss(self, jobs, losses, **options):
        found.append(float(losses(0).detach()))
        original(self, jobs, losses, **options)

    monkeypatch.setattr(Course, "run", first_loss)
    # with decay 0 both adapters are the one that is returned, and the states do not lag behind
    before = course("ilora", decay=0.0)["upper"]
    recipe = LoraSettings(rank=2, alpha=4.0, steps=4, lr=1e-2, batch_size=2)
    rows = {
        name: encode(tiny_llama, tokenizer, [Task([]).prompt(x) for x, _ in tasks[name]], [y for _, y in tasks[name]])
        for name in ("upper", "double")
    }
    chosen = [recipe.rows(rows["double"], "double", 0), recipe.rows(rows["upper"], "double replayed", 0)]
    with torch.no_grad(), lw.Composer(tiny_llama, [before]).activate({"upper": 1.0}):
        expected = [float(job_losses(tiny_llama, tokenizer, part, 1)) for part in chosen]
    assert found[1] == pytest.approx(sum(expected) / 2, abs=1e-5)


@pytest.mark.own_models
def test_a_consistency_loss_is_added_where_the_adapters_differ(course, monkeypatch, tasks):
    found, original = {}, Course.run

    def first_loss(self, jobs, losses, **options):
        found.setdefault(factor, []).append(float(losses(0).detach()))
        original(self, jobs, losses, **options)

    monkeypatch.setattr(Course, "run", first_loss)
    for factor in (0.0, 1.0, 3.0):
        course("ilora", {name: tasks[name] for name in ("upper", "double")}, decay=0.9, consistency=factor)
    lag = found[1.0][1] - found[0.0][1]
    assert lag > 1e-4
    assert found[3.0][1] - found[0.0][1] == pytest.approx(3 * lag, rel=1e-2)


def test_the_reservoir_keeps_at_most_its_size_and_every_row_alike():
    settings = SimpleNamespace(seed=0)
    course = SimpleNamespace(rows={"first": range(30), "second": range(30, 40)}, settings=settings)
    counts = torch.zeros(40)
    for settings.seed in range(400):
        kept = way._reservoir(course, ["first", "second"], 10)
        assert len(set(kept)) == 10
        counts[kept] += 1
    # 100 expected of each, binomial with a standard deviation of 8.7
    assert counts.min() > 65
    assert counts.max() < 135
