"""InfLoRA: a new task's update does not meet the inputs of earlier ones."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.extensions.continual import own_parts
from loraweave.extensions.continual.continual.inflora import designed, grown


def gram(rank=9, seed=0, size=12):
    x_NI = torch.randn(40, rank, generator=torch.Generator().manual_seed(seed)).double()
    x_NI = x_NI @ torch.randn(rank, size, generator=torch.Generator().manual_seed(seed + 1)).double()
    return x_NI, x_NI.T @ x_NI / 40


def empty(size=12):
    return torch.zeros(size, 0, dtype=torch.float64)


def test_a_is_orthogonal_to_the_basis_with_rows_of_norm_one_over_root_3():
    _, old = gram()
    _, new = gram(seed=5)
    basis = grown(empty(), old, 0.9)
    a = designed(new, basis, 3)
    assert a.shape == (3, 12)
    assert float((a @ basis).abs().max()) < 1e-12
    assert torch.allclose(a @ a.T, torch.eye(3).double() / 3, atol=1e-12)


def test_a_spans_the_largest_left_singular_vectors_of_what_the_basis_leaves():
    _, old = gram()
    _, new = gram(seed=5)
    basis = grown(empty(), old, 0.9)
    u = torch.linalg.svd(new - basis @ basis.T @ new).U[:, :3]
    a = designed(new, basis, 3)
    assert torch.allclose(3 * a.T @ a, u @ u.T, atol=1e-9)


def test_the_first_task_takes_the_largest_directions_of_its_inputs():
    _, first = gram()
    u = torch.linalg.eigh(first).eigenvectors[:, -2:]
    a = designed(first, empty(), 2)
    assert torch.allclose(3 * a.T @ a, u @ u.T, atol=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 1.0])
def test_the_basis_has_the_fewest_directions_that_hold_the_energy(energy):
    _, old = gram()
    basis = grown(empty(), old, energy)
    values = torch.linalg.eigvalsh(old).flip(0).clamp(min=0)
    held = values.cumsum(0) / values.sum()
    assert basis.shape[1] == int((held < energy - 1e-12).sum()) + 1
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-12)


def test_a_grown_basis_holds_the_old_one_and_the_energy_of_the_new_inputs():
    (x_old, old), (x_new, new) = gram(rank=4), gram(rank=3, seed=5)
    basis = grown(empty(), old, 0.9)
    both = grown(basis, new, 0.9)
    assert torch.allclose(both @ (both.T @ basis), basis, atol=1e-12)
    for x_NI in (x_old, x_new):
        outside = x_NI - x_NI @ both @ both.T
        assert float(outside.square().sum()) <= 0.1 * float(x_NI.square().sum()) + 1e-9
    assert grown(both, new, 0.9) is both


def test_old_inputs_meet_a_new_update_with_at_most_the_energy_that_was_let_go():
    x_old, old = gram()
    _, new = gram(seed=5)
    for energy in (0.5, 0.9):
        basis = grown(empty(), old, energy)
        a = designed(new, basis, 2)
        assert float((x_old @ a.T).square().sum()) <= (1 - energy) / 3 * float(x_old.square().sum())


def test_where_few_directions_are_free_a_has_as_many_rows():
    _, old = gram(rank=12)
    basis = grown(empty(), old, 1.0 - 1e-9)[:, :11]
    assert designed(old, basis, 3).shape == (1, 12)
    assert designed(old, torch.eye(12).double(), 3).shape == (0, 12)


def test_only_b_is_trained_and_the_sum_of_parts_is_the_model(course, tiny_llama):
    found = course("inflora", energy_first=0.5, energy_last=0.5)
    parts = own_parts(found)
    still = own_parts(course("inflora", energy_first=0.5, energy_last=0.5, settings={"lr": 1e-30}))
    for layer, factors in parts["upper"].layers.items():
        assert torch.equal(factors.a_RI, still["upper"].layers[layer].a_RI)
        assert factors.b_OR.abs().max() > 1e-3
    for part in parts.values():
        for factors in part.layers.values():
            assert torch.allclose(factors.a_RI.norm(dim=1), torch.tensor(3.0).rsqrt(), atol=1e-5)
    engine = lw.Composer(tiny_llama, {**parts, "merged": found["count"]})
    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.no_grad():
        with engine.activate(dict.fromkeys(parts, 1.0)):
            unmerged = tiny_llama(input_ids=ids).logits
        with engine.fused({"merged": 1.0}):
            merged = tiny_llama(input_ids=ids).logits
    assert torch.allclose(unmerged, merged, atol=1e-4)


def test_what_a_later_task_learns_changes_a_first_layers_output_on_old_inputs_by_less_than_was_let_go(
    course, tiny_llama, tokenizer
):
    from loraweave.composer.model.batches import batch, encode, target_logits

    layer = "model.layers.0.self_attn.q_proj"
    found = course("inflora", energy_first=0.9, energy_last=0.9, settings={"target_modules": ("q_proj",), "steps": 20})
    part = own_parts(found)["double"].layers[layer]
    task = lw.Task([("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")])
    rows = encode(tiny_llama, tokenizer, [task.prompt(x) for x, _ in task.examples], [y for _, y in task.examples])
    seen = []
    handle = tiny_llama.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        target_logits(tiny_llama, batch(tiny_llama, tokenizer, rows))
    handle.remove()
    x_NI = seen[0].flatten(0, 1)
    assert float((x_NI @ part.a_RI.T).square().sum()) <= 0.1 / 3 * float(x_NI.square().sum())
    assert part.b_OR.any()
