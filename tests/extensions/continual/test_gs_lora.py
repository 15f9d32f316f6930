"""GS-LoRA: whole blocks are left alone, what is forgotten is pushed no further than the bound."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.train.jobs import LoraJobs, LoraSettings
from loraweave.extensions.continual import own_parts
from loraweave.extensions.continual.continual import gs_lora as way
from loraweave.extensions.continual.course import Course

RETAIN = [("x", "y"), ("y", "z"), ("z", "u")]
LAYERS = {
    "model.layers.0.mlp.up_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 24),
    "model.layers.1.mlp.up_proj": (24, 16),
    "lm_head": (61, 16),
}


@pytest.fixture
def jobs(tiny_llama):
    found = LoraJobs(tiny_llama, LAYERS, ["x"], LoraSettings(rank=2, alpha=4.0))
    for tensor in found.parameters():
        tensor.data.copy_(torch.randn(tensor.shape))
    return found


def test_a_group_is_all_factors_of_a_block(jobs):
    found = {block: [tuple(t.shape) for t in tensors] for block, tensors in way.blocks(jobs).items()}
    assert found == {
        "model.layers.0": [(2, 16), (24, 2), (2, 24), (16, 2)],
        "model.layers.1": [(2, 16), (24, 2)],
        "lm_head": [(2, 16), (61, 2)],
    }


def test_the_proximal_step_shortens_each_groups_norm_by_the_threshold(jobs):
    before = {block: torch.cat([t.detach().flatten() for t in ts]) for block, ts in way.blocks(jobs).items()}
    way.shrink(jobs, 0.25, set())
    for block, tensors in way.blocks(jobs).items():
        after, size = torch.cat([t.detach().flatten() for t in tensors]), before[block].numel()
        expected = before[block] * (1 - 0.25 * size**0.5 / before[block].norm())
        assert torch.allclose(after, expected, atol=1e-6)


def test_a_group_shorter_than_the_threshold_becomes_0_as_a_whole_and_stays_0(jobs):
    zeroed = set()
    with torch.no_grad():
        for tensor in way.blocks(jobs)["model.layers.1"]:
            tensor.mul_(0.01)
    way.shrink(jobs, 0.1, zeroed)
    assert zeroed == {"model.layers.1"}
    assert not any(tensor.any() for tensor in way.blocks(jobs)["model.layers.1"])
    assert all(tensor.all() for block in ("model.layers.0", "lm_head") for tensor in way.blocks(jobs)[block])
    with torch.no_grad():
        for tensor in way.blocks(jobs)["model.layers.1"]:
            tensor.add_(5.0)
    way.shrink(jobs, 0.1, zeroed)
    assert not any(tensor.any() for tensor in way.blocks(jobs)["model.layers.1"])


def zero_blocks(part):
    """{block: whether each of its tensors is all zeros} of an adapter."""
    found = {}
    for layer, factors in part.layers.items():
        found.setdefault(layer.split(".self_attn")[0], []).extend(not t.any() for t in (factors.a_RI, factors.b_OR))
    return found


def test_much_sparsity_zeroes_whole_blocks_and_no_scattered_entries(course):
    settings = {"steps": 12}
    for sparsity, expected in ((0.0, False), (100.0, True)):
        found = course("gs_lora", retain=RETAIN, sparsity=sparsity, dense_steps=2, settings=settings)
        for part in own_parts(found).values():
            for tensors in zero_blocks(part).values():
                assert tensors == [expected] * len(tensors)


def test_the_forgetting_term_is_0_once_the_loss_is_beyond_the_bound(course, tiny_llama, monkeypatch):
    found, original = [], Course.run

    def first_loss(self, jobs, losses, **options):
        found.append(float(losses(0).detach()))
        original(self, jobs, losses, **options)

    monkeypatch.setattr(Course, "run", first_loss)
    for bound, strength in ((0.0, 0.5), (0.0, 0.0), (40.0, 0.5), (50.0, 0.5)):
        course("gs_lora", {"upper": [("a", "A"), ("b", "B")]}, retain=RETAIN, bound=bound, strength=strength)
    within, retained, beyond, further = found
    assert within == retained
    assert further - beyond == pytest.approx(5.0, abs=1e-4)
    assert beyond > retained


def test_what_is_to_be_forgotten_loses_and_what_is_retained_does_not(course, tiny_llama, tokenizer):
    from loraweave.composer.model.scoring import losses

    examples = [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
    settings = {"steps": 60, "lr": 2e-2, "target_modules": ("up_proj", "down_proj")}
    both = {"all": [*examples, *RETAIN]}
    knows = lw.train_adapters(tiny_llama, tokenizer, both, rank=2, steps=60, lr=2e-2, progress=False)
    settings["start"] = {"forget": knows["all"]}
    found = course("gs_lora", {"forget": examples}, retain=RETAIN, strength=1.0, sparsity=0.02, settings=settings)
    engine = lw.Composer(tiny_llama, {"before": knows["all"], "after": found["forget"]})
    figures = {}
    for name in ("before", "after"):
        with engine.activate({name: 1.0}):
            for kind, pairs in (("forget", examples), ("retain", RETAIN)):
                figures[name, kind] = sum(losses(tiny_llama, tokenizer, lw.Task(pairs), pairs)) / len(pairs)
    assert figures["after", "forget"] > figures["before", "forget"] + 1.5
    assert figures["after", "retain"] < figures["before", "retain"] + 0.3
