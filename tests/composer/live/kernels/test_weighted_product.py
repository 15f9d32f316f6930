"""The weighted product and its gradients against the formula, and what it keeps for the backward pass."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loraweave.composer.live.kernels.dense import Dense, Stack
from loraweave.composer.live.pages import PlacedFactors

RANKS = (2, 1, 4)


def stack(dtype=torch.float64, i=7, o=5, ranks=RANKS):
    generator = torch.Generator().manual_seed(0)
    draw = [(torch.randn(r, i, generator=generator), torch.randn(r, o, generator=generator)) for r in ranks]
    return Stack.of([PlacedFactors(a_RI.to(dtype), b_RO.to(dtype)) for a_RI, b_RO in draw], dtype)


def formula(x_BTI, w_BTP, of):
    """sum over experts of w_p (x a_p^T) b_p."""
    copies = x_BTI.shape[0] // w_BTP.shape[0]
    w_BTP = w_BTP.repeat_interleave(copies, dim=0)
    total = x_BTI.new_zeros(*x_BTI.shape[:2], of.b_SO.shape[1])
    for p in range(len(RANKS)):
        mine_S = of.owner_S == p
        total = total + w_BTP[..., p, None] * (x_BTI @ of.a_SI[mine_S].T @ of.b_SO[mine_S])
    return total


SHAPES = [(1, 1), (1, 3), (2, 1), (2, 3), (4, 3)]


def inputs(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x_BTI, y_BTO = torch.randn(4, 3, 7, generator=generator), torch.randn(4, 3, 5, generator=generator)
    w_BTP = torch.randn(*shape, len(RANKS), generator=generator) * (torch.rand(*shape, 3, generator=generator) < 0.7)
    return x_BTI.to(dtype), y_BTO.to(dtype), w_BTP.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("learning", [True, False], ids=["weights learn", "weights are fixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(shape, learning):
    x, y, w = inputs(shape)
    found = []
    for ours in (True, False):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_(), w.clone().requires_grad_(learning)
        # the output of a layer, which is no leaf
        z = leaves[1] * 1
        out = Dense(stack(), leaves[2]).plus(leaves[0], z) if ours else z + formula(leaves[0], leaves[2], stack())
        out.sin().sum().backward()
        found.append((out, *(leaf.grad for leaf in leaves)))
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_finite_differences(shape):
    x, _, w = inputs(shape)
    kept = stack()
    assert torch.autograd.gradcheck(lambda x, w: Dense(kept, w).update(x), (x.requires_grad_(), w.requires_grad_()))


def test_a_second_derivative_is_refused():
    x, _, w = inputs((4, 3))
    out = Dense(stack(), w.requires_grad_()).update(x.requires_grad_())
    (grad,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("into_memory", [False, True], ids=["the update", "into the output"])
def test_a_second_derivative_with_weights_that_are_fixed_is_that_of_the_formula(into_memory):
    x, y, w = inputs((4, 3))
    kept, found = stack(), []
    for ours in (True, False):
        leaf, z = x.clone().requires_grad_(), y.clone()
        z = z + leaf[..., :5] if into_memory else z
        if ours:
            out = Dense(kept, w).plus(leaf, z * 1) if into_memory else z + Dense(kept, w).update(leaf)
        else:
            out = z + formula(leaf, w, kept)
        (first,) = torch.autograd.grad(out.tanh().square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert torch.allclose(*found, rtol=1e-10, atol=1e-12)


def test_the_sum_is_written_into_the_output_of_the_layer_also_where_gradients_go_through():
    x, y, w = inputs((4, 3))
    for learning in (True, False):
        z = y.clone().requires_grad_(learning) * 1
        assert Dense(stack(), w).plus(x, z).data_ptr() == z.data_ptr()


def test_a_leaf_that_learns_is_left_as_it_is():
    x, y, w = inputs((4, 3))
    leaf = y.clone().requires_grad_()
    out = Dense(stack(), w).plus(x, leaf)
    assert torch.equal(leaf, y)
    assert torch.allclose(out, y + formula(x, w, stack()), rtol=1e-12, atol=1e-12)


def test_only_hidden_values_and_weights_are_kept_for_the_backward_pass():
    x, _, w = inputs((4, 3))
    of, sizes = stack(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(tuple(t.shape)), t)[1], lambda t: t):
        Dense(of, w.requires_grad_()).update(x.requires_grad_())
    num_ranks, num_tokens = sum(RANKS), 12
    assert sorted(sizes) == sorted([(num_tokens, num_ranks), (num_tokens, 3), of.a_SI.shape, of.b_SO.shape])


def test_checkpointing_gives_the_same_gradients():
    x, _, w = inputs((4, 3))
    grads = []
    for again in (True, False):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        kept = stack()
        mixed = lambda x, w, kept=kept: Dense(kept, w).plus(x, x[..., :5] * 1)  # noqa: E731
        out = checkpoint(mixed, *leaves, use_reentrant=False) if again else mixed(*leaves)
        out.sin().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close_to_the_formula(dtype):
    x, y, w = inputs((4, 3), dtype)
    expected = y.double() + formula(x.double(), w.double(), stack())
    found = Dense(stack(dtype), w.requires_grad_()).plus(x.requires_grad_(), y.requires_grad_() * 1)
    assert found.dtype == dtype
    assert float((found - expected).detach().abs().max()) < 0.03 * float(expected.abs().max())
    found.sum().backward()
    assert x.grad.dtype == dtype


def test_gradients_below_autocast_are_close_to_the_formula():
    x, y, w = inputs((4, 3), torch.float32)
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    exact = x.double().requires_grad_(), w.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = Dense(stack(torch.float32), leaves[1]).plus(leaves[0], y.clone())
    out.square().sum().backward()
    (y.double() + formula(*exact, stack())).square().sum().backward()
    for mine, theirs in zip(leaves, exact, strict=True):
        assert mine.grad is not None
        assert float((mine.grad - theirs.grad).abs().max()) < 0.05 * float(theirs.grad.abs().max())


def test_vectorised_calls_are_the_formula_too():
    x, _, w = inputs((4, 3))
    kept = stack()
    found = torch.func.vmap(lambda x: Dense(kept, w).update(x))(torch.stack([x, 2 * x]))
    assert torch.allclose(found[1], 2 * formula(x, w, kept), rtol=1e-12, atol=1e-12)
    added = lambda x, y: (Dense(kept, w).add_(x, y), y)[1]  # noqa: E731
    sums = torch.func.vmap(added)(torch.stack([x, 2 * x]), torch.zeros(2, 4, 3, 5).to(x))
    assert torch.allclose(sums, found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(2, 1, 4), (2, 2, 2)], ids=["unequal ranks", "equal ranks"])
def test_without_gradients_it_is_the_formula_also_where_layers_share_what_is_made_of_weights(ranks, shape):
    x, y, w = inputs(shape)
    made = {}
    for of in (stack(ranks=ranks), stack(ranks=ranks, o=6), stack(ranks=(4, 3, 1))):
        z = torch.cat([y, y], dim=2)[..., : of.b_SO.shape[1]].contiguous()
        expected = z + formula(x, w, of)
        for shared in (None, made, made):
            assert torch.allclose(Dense(of, w, made=shared).plus(x, z.clone()), expected, rtol=1e-12, atol=1e-12)
    # of the first two layers, and of the third
    assert len(made) == 2


@pytest.mark.parametrize("ranks", [(2, 1, 4), (2, 2, 2)], ids=["unequal ranks", "equal ranks"])
def test_an_expert_of_weight_zero_adds_nothing_where_its_hidden_values_overflow(ranks):
    x, y, w = inputs((4, 3))
    of = stack(ranks=ranks)
    of.a_SI[of.owner_S == 1] = torch.inf
    w[..., 1] = 0.0
    found = Dense(of, w).plus(x, y.clone())
    of.a_SI[of.owner_S == 1] = 0.0
    assert torch.allclose(found, y + formula(x, w, of), rtol=1e-12, atol=1e-12)
