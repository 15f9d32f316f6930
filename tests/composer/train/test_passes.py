"""Jobs of any kind in one pass: each has its own rows, and the values and gradients of being alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from loraweave.composer.model.batches import batch, encode, token_losses
from loraweave.composer.train.jobs import LoraJob, RowRange, SharedPass, add_products

LAYER, OTHER = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ROWS = [("a", "A"), ("abc", "B"), ("c d e", "CC"), ("d", "D"), ("e", "E"), ("hello", "H")]


class Gated:
    """Two experts in one layer, weighed token by token: an update that is no product of factors."""

    def __init__(self, name, generator):
        self.name = name
        self.layers = [LAYER]
        self.gate_EI, self.a_ERI, self.b_EOR = (
            (0.3 * torch.randn(*shape, generator=generator).double()).requires_grad_()
            for shape in ((2, 16), (2, 3, 16), (2, 16, 3))
        )
        self.used = []

    def parameters(self):
        return [self.gate_EI, self.a_ERI, self.b_EOR]

    def begin(self, inputs, prompt_BT):
        self.seen = inputs["input_ids"].tolist(), prompt_BT.tolist() if prompt_BT is not None else None

    def low_rank(self, layer):
        return None

    def update(self, layer, x_BTI):
        w_BTE = functional.linear(x_BTI, self.gate_EI).softmax(dim=-1)
        self.used.append(w_BTE)
        return torch.einsum("bte,eor,eri,bti->bto", w_BTE, self.b_EOR, self.a_ERI, x_BTI)

    def penalty(self):
        return self.used[-1].mean(dim=(0, 1)).square().sum()


def jobs_of(generator):
    def lora(name, *layers):
        shapes = {LAYER: ((3, 16), (16, 3)), OTHER: ((2, 24), (16, 2))}
        factors = {
            layer: tuple(0.3 * torch.randn(*s, generator=generator).double() for s in shapes[layer]) for layer in layers
        }
        return LoraJob(name, factors, 2.0)

    return [lora("both", LAYER, OTHER), Gated("gated", generator), lora("other", OTHER)]


@pytest.fixture
def model(make_model):
    return make_model("llama", dtype=torch.float64).requires_grad_(False)


def gradients(model, tokenizer, jobs, counts, rows, chosen):
    """Of the chosen job's loss, with its penalty."""
    job = jobs[chosen]
    for parameter in job.parameters():
        parameter.grad = None
    with SharedPass(model, jobs, counts):
        losses_BK = token_losses(model, batch(model, tokenizer, rows))
        start = sum(counts[:chosen])
        penalty = job.penalty()
        loss = losses_BK[start : start + counts[chosen]].sum() + (0.0 if penalty is None else penalty)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in job.parameters()]


@pytest.mark.parametrize("counts", [[2, 2, 2], [1, 3, 2], [3, 2, 1]])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_the_loss_and_the_gradients_of_a_job_are_those_of_the_job_alone(model, tokenizer, counts, chosen):
    jobs = jobs_of(torch.Generator().manual_seed(5))
    rows = encode(model, tokenizer, [text for text, _ in ROWS], [target for _, target in ROWS])
    together = gradients(model, tokenizer, jobs, counts, rows, chosen)
    own = rows[sum(counts[:chosen]) :][: counts[chosen]]
    # as wide as the batch, since the mean over places counts padding too
    if isinstance(jobs[chosen], Gated):
        widest = max(rows, key=len)
        own = [*own, widest]
        alone = gradients(model, tokenizer, [jobs[chosen], jobs[2]], [counts[chosen], 1], own, 0)
    else:
        alone = gradients(model, tokenizer, [jobs[chosen]], [counts[chosen]], own, 0)
    assert torch.allclose(together[0], alone[0], atol=1e-9)
    for found, expected in zip(together[1], alone[1], strict=True):
        assert found.abs().max() > 1e-4
        assert torch.allclose(found, expected, atol=1e-9)


def test_the_gated_update_is_its_formula_in_the_logits_of_its_rows(model, tokenizer, make_model):
    jobs = jobs_of(torch.Generator().manual_seed(5))
    ids = torch.tensor([[5, 9, 30], [7, 7, 12], [4, 8, 15]])
    gated, dense = jobs[1], make_model("llama", dtype=torch.float64)
    with torch.no_grad(), SharedPass(model, jobs):
        found = model(input_ids=ids).logits[1]

    def hook(_, args, y):
        x = args[0]
        weights = torch.softmax(x @ gated.gate_EI.T, dim=-1)
        return y + sum(weights[..., e, None] * (x @ (gated.b_EOR[e] @ gated.a_ERI[e]).T) for e in range(2))

    dense.get_submodule(LAYER).register_forward_hook(hook)
    with torch.no_grad():
        assert torch.allclose(found, dense(input_ids=ids[1:2]).logits[0], atol=1e-9)


def test_leaving_after_an_exception_removes_every_hook(model):
    jobs = jobs_of(torch.Generator().manual_seed(5))
    ids = torch.tensor([[5, 9, 30]])
    before = model(input_ids=ids).logits
    with pytest.raises(RuntimeError), SharedPass(model, jobs[:1]):
        raise RuntimeError
    assert torch.equal(model(input_ids=ids).logits, before)
    jobs[0].factors["nowhere"] = jobs[0].factors[OTHER]
    with pytest.raises(AttributeError):
        SharedPass(model, jobs[:1]).__enter__()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("counts", [[1, 3, 2], None])
def test_a_job_is_told_the_inputs_of_its_own_rows_and_which_are_prompt(model, tokenizer, counts):
    jobs = jobs_of(torch.Generator().manual_seed(5))
    rows = encode(model, tokenizer, [text for text, _ in ROWS], [target for _, target in ROWS])
    stacked = batch(model, tokenizer, rows)
    with torch.no_grad(), SharedPass(model, jobs, counts):
        token_losses(model, stacked)
    own = slice(1, 4) if counts else slice(2, 4)
    ids, prompts = jobs[1].seen
    assert ids == stacked.inputs["input_ids"][own].tolist()
    lengths = [sum(row) for row in prompts]
    assert lengths == [len(row.prompt) for row in rows[own]]


# a gap before, between and after; ranges of one token; ranks of one and seven
CASES = {
    "whole": ([RowRange(0, 4, 2.0), RowRange(4, 14, 0.5)], (3, 7)),
    "gaps": ([RowRange(1, 2, 1.0), RowRange(5, 11, -0.7)], (1, 4)),
    "one": ([RowRange(0, 14, 1.5)], (1,)),
}


def made(ranks, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    factors = [(random(rank, 5), random(6, rank)) for rank in ranks]
    return random(2, 7, 5), random(2, 7, 6), factors


def naive_products(y, x, ranges, factors):
    """Return the result of `add_products`, computed product by product."""
    x_NI, y_NO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    parts, end = [], 0
    for part, (a_RI, b_OR) in zip(ranges, factors, strict=True):
        x_MI = x_NI[part.start : part.stop]
        hidden_MR = functional.linear(x_MI, a_RI.to(x.dtype))
        update_MO = functional.linear(hidden_MR, part.scale * b_OR.to(x.dtype))
        parts += [y_NO[end : part.start], y_NO[part.start : part.stop] + update_MO.to(y.dtype)]
        end = part.stop
    return torch.cat([*parts, y_NO[end:]]).view_as(y)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_products_one_by_one(case):
    ranges, ranks = CASES[case]
    found, gradients = [], []
    for products in (add_products, naive_products):
        x, y, factors = made(ranks)
        # the layer's own product, so that y is nobody else's
        result = products(y * 1.0, x, ranges, factors)
        (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
        found.append(result)
        gradients.append([tensor.grad for tensor in (x, y, *(t for pair in factors for t in pair))])
    assert torch.allclose(*found, atol=1e-12)
    for fast, naive in zip(*gradients, strict=True):
        assert torch.allclose(fast, naive, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    ranges, ranks = CASES["gaps"]
    x, y, factors = made(ranks)

    def products(x, y, *flat):
        return add_products(y * 1.0, x, ranges, list(zip(flat[::2], flat[1::2], strict=True)))

    assert torch.autograd.gradcheck(products, (x, y, *(tensor for pair in factors for tensor in pair)))


@pytest.mark.parametrize("layout", ["view", "transposed", "leaf"])
def test_an_output_that_may_not_be_written_to_is_left_as_it_was(layout):
    ranges, ranks = CASES["whole"]
    x, y, factors = made(ranks)
    given = {"view": (y * 1.0).view(14, 6)[:14].view(2, 7, 6), "transposed": (y * 1.0).mT.contiguous().mT, "leaf": y}[layout]
    before = given.detach().clone()
    found = add_products(given, x, ranges, factors)
    assert torch.equal(given, before)
    assert torch.allclose(found, naive_products(before, x, ranges, factors), atol=1e-12)


def test_factors_in_fp32_beside_a_base_in_bf16_get_gradients_in_fp32():
    ranges, ranks = CASES["whole"]
    x, y, _ = made(ranks, dtype=torch.bfloat16)
    _, _, factors = made(ranks, dtype=torch.float32)
    add_products(y * 1.0, x, ranges, factors).float().square().sum().backward()
    grads = [t.grad for pair in factors for t in pair]
    assert {grad.dtype for grad in grads} == {torch.float32}
    exact = [t.detach().double().requires_grad_() for pair in factors for t in pair]
    pairs = list(zip(exact[::2], exact[1::2], strict=True))
    naive_products(y.detach().double(), x.detach().double(), ranges, pairs).square().sum().backward()
    for grad, wanted in zip(grads, exact, strict=True):
        assert float((grad - wanted.grad).norm() / wanted.grad.norm()) < 2e-2
