"""The estimate of a step's peak against what autograd keeps of whole batches, and what the system says of memory."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from loraweave.common import process
from loraweave.composer.model.batches import EncodedRow, batch, token_losses
from loraweave.composer.train.jobs import LoraJobs, LoraSettings
from loraweave.composer.train.state import JobSize
from loraweave.extensions.training_at_scale.step_memory import MemoryModel, MemoryUse, free_bytes

LAYERS = {"llama": {"model.layers.0.self_attn.q_proj": (16, 16)}, "gpt2": {"transformer.h.0.attn.c_attn": (48, 16)}}
LAYERS["t5"] = {"encoder.block.0.layer.0.SelfAttention.q": (16, 16)}


def kept_bytes(model, tokenizer, jobs, num_rows, tokens, targets):
    """Of rows of so many tokens, each storage once, without what belongs to the model or to the jobs."""
    prompt = tokens if model.config.is_encoder_decoder else tokens - targets
    rows = [EncodedRow((5,) * (prompt - (index % 2)), (7,) * targets) for index in range(num_rows)]
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *jobs.parameters()]}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), jobs:
        found = token_losses(model, batch(model, tokenizer, rows))
    assert found.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(("num_rows", "tokens", "targets"), [(2, 23, 3), (6, 41, 7), (4, 60, 1)])
def test_what_is_kept_of_a_batch_is_as_estimated(kind, num_rows, tokens, targets, make_model, tokenizer):
    model = make_model(kind).requires_grad_(False)
    jobs = LoraJobs(model, LAYERS[kind], ["one", "two"], LoraSettings(rank=3, alpha=6.0))
    estimate = MemoryModel.of(model, tokenizer, jobs.members[0])
    kept = num_rows * (estimate.token_bytes * tokens + estimate.pair_bytes * tokens**2 + estimate.target_bytes * targets)
    assert kept == pytest.approx(kept_bytes(model, tokenizer, jobs, num_rows, tokens, targets), rel=0.15)


def test_the_peak_is_weights_factors_with_their_copies_what_is_kept_and_the_logits():
    estimate = MemoryModel(1000, token_bytes=10.0, pair_bytes=0.5, target_bytes=4.0, vocabulary=61)
    short, long = JobSize(2, 5.0, 6, 3, 100), JobSize(3, 8.0, 9, 2, 70, num_copies=5)
    kept = 5 * (10 * 9 + 0.5 * 81 + 4 * 3)
    assert estimate.peak([short, long]) == int(1000 + 4 * 100 * 4 + 4 * 70 * 5 + 1.15 * kept + 2 * 4 * 5 * 3 * 61)
    assert estimate.peak([short]) < estimate.peak([short, long])


@pytest.mark.own_models
def test_the_weights_are_those_of_the_base(tiny_llama, tokenizer):
    job = LoraJobs(tiny_llama, LAYERS["llama"], ["one"], LoraSettings(rank=3, alpha=6.0)).members[0]
    expected = sum(p.numel() * 4 for p in tiny_llama.parameters()) + sum(b.nbytes for b in tiny_llama.buffers())
    found = MemoryModel.of(tiny_llama.requires_grad_(False), tokenizer, job)
    assert (found.weight_bytes, found.vocabulary) == (expected, 61)
    assert job.parameters()[0].grad is None


def num_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.own_models
def test_nothing_of_what_is_counted_stays_in_memory(tiny_llama, tokenizer):
    job = LoraJobs(tiny_llama, LAYERS["llama"], ["one"], LoraSettings(rank=3, alpha=6.0)).members[0]
    MemoryModel.of(tiny_llama.requires_grad_(False), tokenizer, job)
    before = num_tensors()
    MemoryModel.of(tiny_llama, tokenizer, job)
    assert num_tensors() == before


CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 3000 kB available, in no container."""
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:   3000 kB\n")
    monkeypatch.setattr(process, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(process, "CGROUP", tmp_path)
    return tmp_path


def limited(folder, maximum, current, cached):
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_free_is_what_the_machine_has_available(system):
    assert free_bytes(CPU) == 3000 * 1024


def test_in_a_container_free_is_what_its_limit_leaves(system):
    limited(system, 500_000, 300_000, 50_000)
    assert free_bytes(CPU) == 250_000
    limited(system, 300_000, 400_000, 0)
    assert free_bytes(CPU) == 0


def test_a_container_without_a_limit_or_with_a_larger_one_leaves_what_the_machine_has(system):
    limited(system, "max", 300_000, 0)
    assert free_bytes(CPU) == 3000 * 1024
    limited(system, 10**12, 0, 0)
    assert free_bytes(CPU) == 3000 * 1024


def test_where_the_system_does_not_say_nothing_is_claimed(system):
    (system / "meminfo").unlink()
    assert free_bytes(CPU) is None
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has it")
def test_use_has_grown_by_at_least_what_was_written_to(monkeypatch):
    monkeypatch.setattr(MemoryUse, "_highest", lambda self: 7_000_000)
    use = MemoryUse(CPU)
    assert use.grown() is None
    monkeypatch.setattr(MemoryUse, "_highest", lambda self: use._begun + 5_000_000)
    assert use.grown() == 5_000_000
