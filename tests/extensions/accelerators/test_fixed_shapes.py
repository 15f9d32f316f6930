"""Within batch_invariant a row has the same bits whatever runs beside it."""

from __future__ import annotations

import random

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_near, num_terms
from torch.nn.functional import scaled_dot_product_attention

import loraweave as lw
from loraweave.errors import CompositionError, ScopeError
from loraweave.extensions.accelerators import batch_invariant, fixed_shapes
from loraweave.extensions.accelerators.fixed_shapes import KEYS, TILE, fixed_attention, fixed_linear, fixed_products

# sizes at which the libraries' products differ with the number of rows, and ones that fill no vector
SIZES = {"hidden_size": 72, "intermediate_size": 200, "num_attention_heads": 6}
MIXTURES = [None, {"a": 1.0}, {"b": 0.7, "c": -0.4}, {"c": 0.3, "a": 0.2, "b": 1.1}]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def engine(request, make_model, make_adapter):
    model = make_model("llama", **SIZES).to(request.param)
    targets = ("q_proj", "v_proj", "down_proj", "up_proj")
    adapters = [
        make_adapter(model, name, rank=rank, targets=targets, seed=rank) for name, rank in (("a", 1), ("b", 4), ("c", 9))
    ]
    return lw.Composer(model, adapters)


def drawn_rows(seed, count):
    """(tokens, mixture) of rows of 1 to 40 tokens."""
    generator = random.Random(seed)
    return [
        ([generator.randrange(3, 60) for _ in range(generator.randint(1, 40))], generator.choice(MIXTURES))
        for _ in range(count)
    ]


def batch_of(rows, width=None):
    """Filled up on the left to the longest, or to `width`."""
    width = width or max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens, _ in rows])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens, _ in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def last_logits(engine, rows, width=None):
    with engine.activate([mixture for _, mixture in rows]):
        return engine.model(**batch_of(rows, width)).logits[:, -1]


def test_rows_of_random_batches_have_the_bits_that_they_have_alone(engine):
    known, generator = drawn_rows(0, 24), random.Random(1)
    with batch_invariant(engine.model):
        alone = [last_logits(engine, [row])[0] for row in known]
        for _ in range(80):
            places = [generator.randrange(len(known)) for _ in range(generator.randint(1, 8))]
            rows = [known[place] for place in places]
            found = last_logits(engine, rows, max(len(tokens) for tokens, _ in rows) + generator.randint(0, 9))
            for place, row in zip(places, found, strict=True):
                assert torch.equal(row, alone[place])


def test_what_is_read_after_a_cache_has_the_bits_of_the_whole_prompt(engine, cache_argument):
    name = cache_argument(engine.model)
    rows = drawn_rows(2, 5)
    rows = [(tokens + [7] * (20 - len(tokens) % 20), mixture) for tokens, mixture in rows]
    with batch_invariant(engine.model), torch.no_grad():
        for tokens, mixture in rows:
            whole = last_logits(engine, [(tokens, mixture)])[0]
            batch = batch_of([(tokens, mixture)])
            with engine.activate(mixture or {}):
                first = engine.model(input_ids=batch["input_ids"][:, :-3], use_cache=True)
                rest = engine.model(input_ids=batch["input_ids"][:, -3:], **{name: first[name]})
            assert torch.equal(rest.logits[0, -1], whole)


def test_the_answers_are_those_of_the_formula_within_rounding(engine):
    rows = drawn_rows(3, 6)
    plain = last_logits(engine, rows)
    with batch_invariant(engine.model):
        fixed = last_logits(engine, rows)
    assert fixed.dtype == plain.dtype
    # in half precision, ten operations of each of two layers round after one another, and the head
    assert_near(fixed, plain, num_terms(engine.model) if plain.dtype == torch.float32 else 10 * 2 + 1)


@pytest.mark.parametrize("width", [1, 17, fixed_shapes.LANES, fixed_shapes.LANES + 1, 3 * fixed_shapes.LANES + 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_single_elements_give_a_row_the_bits_that_it_has_alone(dtype, width):
    # between 0 and 1, where all of them are defined
    x = torch.rand(45, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    functions = [getattr(torch, name) for name in fixed_shapes.ELEMENTWISE.split()]
    functions += [getattr(torch.Tensor, name) for name in fixed_shapes.ELEMENTWISE.split()]
    functions += [getattr(torch.nn.functional, name) for name in ("silu", "gelu", "softplus", "mish", "elu")]
    # with what it was called with beside
    functions += [lambda x: torch.nn.functional.softplus(x, 2.0), lambda x: torch.nn.functional.elu(x - 0.5, alpha=0.3)]
    for function in functions:
        with fixed_shapes._FixedShapes():
            together, alone = function(x), torch.cat([function(row[None]) for row in x])
        assert torch.equal(together, alone)
        assert_near(together, function(x.double()), 4)


@pytest.mark.parametrize("outputs", [1, TILE - 1, TILE, TILE + 1])
@pytest.mark.parametrize("tokens", [1, TILE, TILE + 3])
def test_few_outputs_and_few_tokens_are_those_of_the_formula(tokens, outputs):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*size, generator=generator).double() for size in ((2, tokens, 5), (outputs, 5), (outputs,)))
    torch.testing.assert_close(fixed_linear(x, w, b), x @ w.T + b, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fixed_linear(x, w), x @ w.T, rtol=1e-13, atol=1e-13)
    if tokens <= TILE:
        both = torch.stack([w, -w])
        torch.testing.assert_close(fixed_products(x, both), x @ both.mT, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, TILE - 1, TILE, TILE + 1])
@pytest.mark.parametrize("inputs", [1, 5, 6, 31, 72])
def test_a_token_has_the_same_outputs_at_every_place_of_a_tile(inputs, outputs, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*size, generator=generator).to(dtype) for size in ((2, TILE, inputs), (2, outputs, inputs)))
    for found, alone in (
        (fixed_linear(x, w[0]), [fixed_linear(x[:, place], w[0]) for place in range(TILE)]),
        (fixed_products(x, w), [fixed_products(x[:, place : place + 1], w)[:, 0] for place in range(TILE)]),
    ):
        assert torch.equal(found, torch.stack(alone, dim=1))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    queries=st.integers(1, 2 * TILE + 1),
    before=st.integers(0, 2 * KEYS),
    kind=st.sampled_from(["none", "causal", "padding", "additive"]),
    seed=st.integers(0, 99),
)
def test_attention_in_tiles_equals_the_formula(heads, queries, before, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    num_keys = queries + (0 if kind == "causal" else before)
    q, k, v = (
        torch.randn(2, heads, num, 8, generator=generator, dtype=torch.float64) for num in (queries, num_keys, num_keys)
    )
    mask = None
    if kind in ("padding", "additive"):
        mask = torch.ones(queries, num_keys, dtype=torch.bool).tril(num_keys - queries).expand(2, 1, -1, -1).clone()
        mask[1, :, :, : num_keys // 3] = False
        # a query of padding sees itself, since nothing would be NaN in the formula
        mask |= torch.eye(queries, num_keys, dtype=torch.bool).roll(num_keys - queries, 1) if queries <= num_keys else mask
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    given = {"attn_mask": mask, "is_causal": kind == "causal"}
    found, expected = fixed_attention(q, k, v, **given), scaled_dot_product_attention(q, k, v, **given)
    # of padding only that it is finite matters
    real = slice(None) if mask is None else slice(-1, None)
    assert torch.isfinite(found).all()
    assert torch.allclose(found[:, :, real], expected[:, :, real], rtol=1e-10, atol=1e-12)


def test_a_product_in_tiles_equals_the_formula_for_any_number_of_tokens():
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (5,)))
    for leading in ((), (1,), (TILE,), (3, 11), (2, 0)):
        x = torch.randn(*leading, 7, generator=generator, dtype=torch.float64)
        assert torch.allclose(fixed_linear(x, weight, bias), x @ weight.T + bias, rtol=1e-12)


@pytest.mark.parametrize("num_outputs", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("size", [64, 72])
def test_products_of_few_outputs_have_the_bits_that_they_have_alone(size, num_outputs):
    generator = torch.Generator().manual_seed(num_outputs)
    token, weight = torch.randn(size, generator=generator), torch.randn(num_outputs, size, generator=generator)
    alone = fixed_linear(token, weight)
    product = fixed_products(token.view(1, 1, -1), weight[None])[0, 0]
    for place in range(TILE):
        x = torch.randn(3, TILE, size, generator=generator)
        weights = torch.randn(3, num_outputs, size, generator=generator)
        x[1, place], weights[1] = token, weight
        assert torch.equal(fixed_linear(x[1], weight)[place], alone)
        assert torch.equal(fixed_products(x, weights)[1, place], product)


def test_gains_biases_and_layers_of_gpt2_are_invariant_too(make_model, make_adapter):
    model = make_model("gpt2")
    adapters = [
        make_adapter(model, name, rank=2, targets=("c_attn", "c_fc"), seed=seed, bias=True, gain=gain)
        for seed, (name, gain) in enumerate((("a", True), ("b", False), ("c", True)))
    ]
    engine, rows = lw.Composer(model, adapters), drawn_rows(4, 5)
    plain = last_logits(engine, rows)
    with batch_invariant(model):
        together = last_logits(engine, rows)
        for row, found in zip(rows, together, strict=True):
            assert torch.equal(last_logits(engine, [row])[0], found)
    assert torch.allclose(together, plain, atol=1e-4)


def test_what_cannot_be_fixed_is_refused_by_name(engine, make_model, pool):
    model, rows = engine.model, drawn_rows(5, 2)
    with engine.activate({"a": 1.0}), batch_invariant(model), pytest.raises(ScopeError, match="opened inside"):
        model(**batch_of(rows))
    with batch_invariant(model), engine.activate({"a": 1.0}) as opened:
        pass
    assert opened.closed
    last_logits(engine, rows)
    with (
        batch_invariant(model),
        engine.activate(lw.router("arrow", engine.pool, top_k=1)),
        pytest.raises(ScopeError, match="routers, activated LoRAs"),
    ):
        model(**batch_of(rows))
    for name, product in (("torch.bmm", torch.bmm), ("torch.matmul", lambda left, right: left @ right)):
        layer = engine.model.model.layers[1].mlp.register_forward_hook(
            lambda module, args, y, product=product: product(y, y.transpose(1, 2))
        )
        with batch_invariant(model):
            assert product(torch.ones(1, 2, 2), torch.ones(1, 2, 2)).sum() == 8
            with pytest.raises(ScopeError, match=name.replace(".", r"\.")):
                model(**batch_of(rows))
            assert product(torch.ones(1, 2, 2), torch.ones(1, 2, 2)).sum() == 8
        layer.remove()
    eager = make_model("llama")
    eager.config._attn_implementation = "eager"
    with pytest.raises(CompositionError, match="attn_implementation='sdpa'"), batch_invariant(eager):
        pass
    sliding = make_model("llama")
    sliding.config.sliding_window = 4
    with pytest.raises(CompositionError, match="window of 4 tokens"), batch_invariant(sliding):
        pass
    assert tiny_models.logits(model, tiny_models.model_inputs("llama")).shape == (3, 7, 61)
