"""A batch by the arena is the formula, whichever came before it; test_triton.py runs this in Triton's interpreter."""

from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.extensions.accelerators.hooks.arena import Arena
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

LAYERS = {"0": (7, 5), "1": (5, 6), "2": (6, 7)}
WEIGHT = st.floats(-2, 2, width=32)
ROWS = st.lists(st.one_of(st.none(), st.dictionaries(st.sampled_from("abcd"), WEIGHT, max_size=4)), min_size=2, max_size=5)
RANKS = st.dictionaries(st.sampled_from(list(LAYERS)), st.integers(1, 5), min_size=1)


def adapter(name, ranks, seed):
    """An expert with so many ranks in each layer."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        layer: Factors(
            torch.randn(rank, LAYERS[layer][0], generator=generator),
            torch.randn(LAYERS[layer][1], rank, generator=generator),
        )
        for layer, rank in ranks.items()
    }
    return Adapter(name, "tiny", factors)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*shape) for shape in LAYERS.values())).to(dtype).requires_grad_(False)


def experts(**ranks):
    """Experts with the same rank in all layers."""
    return [adapter(name, dict.fromkeys(LAYERS, rank), seed) for seed, (name, rank) in enumerate(ranks.items())]


def formula(base, adapters, rows, x_BTI):
    """y = W x + bias + sum over e of w_e b_e (a_e x), in fp64, layer after layer and row after row."""
    found = []
    for row, x_TI in zip(rows, x_BTI.double(), strict=True):
        for name, module in base.named_children():
            y_TO = x_TI @ module.weight.double().T + module.bias.double()
            for each in adapters:
                weight = (row or {}).get(each.name, 0.0)
                if weight and name in each.layers:
                    factors = each.layers[name]
                    y_TO = y_TO + weight * (x_TI @ factors.a_RI.double().T) @ factors.b_OR.double().T
            x_TI = y_TO
        found.append(x_TI)
    return torch.stack(found)


def arena_of(engine):
    return next(hook for hook in engine._plans.hooks if isinstance(hook, Arena))


def close(found, wanted, limit):
    return float((found.double() - wanted).abs().max()) <= limit * max(1.0, float(wanted.abs().max()))


@pytest.fixture
def takes(monkeypatch):
    """The boards that were taken so far."""
    found = []
    own = Arena.prepare
    monkeypatch.setattr(Arena, "prepare", lambda *given: found.append(own(*given)) or found[-1])
    return found


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-2)])
@settings(max_examples=6, deadline=None)
@given(
    ranks=st.lists(RANKS, min_size=4, max_size=4),
    batches=st.lists(ROWS, min_size=1, max_size=4),
    tokens=st.integers(1, 3),
    on_end=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_one_batch_after_the_other_is_the_formula(dtype, limit, ranks, batches, tokens, on_end, seed):
    base = model(dtype)
    adapters = [adapter(name, own, number) for number, (name, own) in enumerate(zip("abcd", ranks, strict=True))]
    engine = Composer(base, adapters)
    generator = torch.Generator().manual_seed(seed)
    for rows in batches:
        x_BTI = torch.randn(len(rows) * on_end, tokens, 7, generator=generator).to(dtype)
        repeated = [row for row in rows for _ in range(on_end)]
        with torch.inference_mode(), engine.activate(rows):
            for _ in range(2):
                found = base(x_BTI)
        rounded = [
            Adapter(each.name, "tiny", {
                layer: Factors(f.a_RI.to(dtype).float(), f.b_OR.to(dtype).float()) for layer, f in each.layers.items()
            })
            for each in adapters
        ]  # fmt: skip
        assert close(found, formula(base, rounded, repeated, x_BTI), limit)


def test_another_mixture_moves_no_tensor_and_makes_no_kernel(takes):
    base = model()
    engine = Composer(base, experts(a=2, b=2, c=2))
    seen = []
    for rows in ([{"a": 1.0}, {"b": 0.5}], [{"c": -1.0}, {"b": 2.0}], [{"b": 1.0}, None]):
        with torch.no_grad(), engine.activate(rows):
            base(torch.ones(2, 1, 7))
            board = takes[-1]
            arena = arena_of(engine)
            seen.append(
                [
                    *(flat.data_ptr() for flat in board.flat_by_device.values()),
                    *(table.a_CI.data_ptr() for table in arena._tables.values()),
                    *(id(kernel) for kernel in board.kernels.values()),
                ]
            )
    # the arena has grown while experts came
    with torch.no_grad():
        for rows in ([{"a": 1.0}, {"c": 3.0}], [{"c": -1.0}, {"b": 2.0, "a": 1.0}], [{"a": 0.5}, {"b": 1.0}]):
            with engine.activate(rows):
                base(torch.ones(2, 1, 7))
            board = takes[-1]
            seen.append([*(flat.data_ptr() for flat in board.flat_by_device.values()), *map(id, board.kernels.values())])
    assert seen[-1] == seen[-2] == seen[-3]
    assert all(len(each) == 1 + len(LAYERS) for each in seen[-3:])


def test_activations_that_are_open_at_once_do_not_share_a_board():
    base, adapters = model(), experts(a=2, b=2, c=3)
    engine = Composer(base, adapters)
    x_BTI = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(0))
    outer, inner = [{"a": 1.0}, {"b": 1.0}], [{"c": 1.0}, {"a": -1.0}]
    found = {}

    def other():
        with torch.no_grad(), engine.activate([{"b": -1.0}, {"a": 0.3}]):
            found["thread"] = base(x_BTI)

    with torch.no_grad(), engine.activate(outer) as first:
        base(x_BTI)
        with engine.activate(inner):
            found["inner"] = base(x_BTI)
        thread = Thread(target=other)
        thread.start()
        thread.join()
        found["outer"] = base(x_BTI)
        found["run"] = first.run(base, x_BTI)
    rows = {"inner": inner, "outer": outer, "run": outer, "thread": [{"b": -1.0}, {"a": 0.3}]}
    assert all(close(found[name], formula(base, adapters, rows[name], x_BTI), 2e-6) for name in rows)


def test_two_activations_of_one_mixture_share_a_board_until_both_have_ended(takes):
    base, adapters = model(), experts(a=2, b=2)
    engine = Composer(base, adapters)
    x_BTI = torch.ones(2, 1, 7)
    rows = [{"a": 1.0}, {"b": 1.0}]
    with torch.no_grad(), engine.activate(rows):
        with engine.activate(rows):
            base(x_BTI)
        with engine.activate([{"b": 4.0}, {"a": 5.0}]):
            base(x_BTI)
        assert close(base(x_BTI), formula(base, adapters, rows, x_BTI), 2e-6)
    assert len(takes) == 2


def test_a_layer_that_is_called_alone_knows_nothing_of_a_board_that_others_have():
    base, adapters = model(), experts(a=2, b=2)
    engine = Composer(base, adapters)
    x_BTI, rows = torch.ones(2, 1, 7), [{"a": 1.0}, {"b": 1.0}]
    with torch.no_grad():
        for mixture in (rows, [{"b": 4.0}, {"a": 5.0}]):
            with engine.activate(mixture):
                base(x_BTI)
        with engine.activate(rows):
            found = base[0](x_BTI)
    assert close(found, formula(base[:1], adapters, rows, x_BTI), 2e-6)


def test_experts_that_nobody_uses_make_room(takes):
    base, adapters = model(), experts(a=2, b=2, c=2, d=2)
    engine = Composer(base, adapters)
    row_bytes = 4 * sum(i + o for i, o in LAYERS.values())
    arena = arena_of(engine)
    arena.max_bytes = 5 * row_bytes
    x_BTI = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(0))
    for first, second in ("ab", "bc", "cd", "da", "ac"):
        rows = [{first: 1.0}, {second: -0.5}]
        with torch.no_grad(), engine.activate(rows):
            assert close(base(x_BTI), formula(base, adapters, rows, x_BTI), 2e-6)
        assert arena.num_bytes <= 5 * row_bytes
    rows = [{"a": 1.0, "b": 1.0}, {"c": 1.0, "d": 1.0}]
    with torch.no_grad(), engine.activate(rows):
        # what is used at once has no limit
        assert close(base(x_BTI), formula(base, adapters, rows, x_BTI), 2e-6)
        assert arena.num_bytes == 9 * row_bytes
    assert None not in takes


def two_experts_used_once():
    """(base, its two adapters, an engine whose arena has both, an input of a row for each, the mixture of each row)."""
    base, adapters = model(), experts(a=2, b=3)
    engine = Composer(base, adapters)
    x_BTI, rows = torch.ones(2, 1, 7), [{"a": 1.0}, {"b": 1.0}]
    with torch.no_grad(), engine.activate(rows):
        base(x_BTI)
    return base, adapters, engine, x_BTI, rows


def test_a_name_that_stands_for_another_expert_has_its_factors():
    base, adapters, engine, x_BTI, rows = two_experts_used_once()
    with torch.no_grad():
        other = adapter("a", {"0": 4, "2": 1}, 77)
        engine.unload("a")
        engine.load("a", other)
        with engine.activate(rows):
            assert close(base(x_BTI), formula(base, [other, adapters[1]], rows, x_BTI), 2e-6)


def test_a_model_that_moves_to_another_dtype_has_its_experts_there(takes):
    base, adapters, engine, x_BTI, _ = two_experts_used_once()
    with torch.no_grad():
        base.bfloat16()
        with engine.activate([{"a": 1.0}, {"b": 0.5}]):
            found = base(x_BTI.bfloat16())
    assert close(found, formula(base, adapters, [{"a": 1.0}, {"b": 0.5}], x_BTI), 6e-2)


# of the other row's products, which numpy makes here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_is_untouched_where_its_experts_have_nothing_even_if_its_input_is_infinite(takes):
    base = model()
    engine = Composer(base, [adapter("a", {"0": 2}, 0), adapter("b", {"1": 3}, 1)])
    found = []
    base[0].register_forward_hook(lambda module, args, y_BTO: found.append(y_BTO.clone()))
    with torch.no_grad(), engine.activate([{"b": 1.0}, {"a": 1.0}]):
        base[0].weight.fill_(1.0)
        base(torch.full((2, 1, 7), torch.inf))
    assert None not in takes
    assert bool(found[0][0].isposinf().all())


def test_gradients_are_those_of_the_mixture_also_after_others_have_come():
    base, adapters = model(), experts(a=2, b=3)
    engine = Composer(base, adapters)
    found = []
    rows = [{"a": 1.0}, {"b": 0.5}]
    x_BTI = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(0))
    for function in (lambda x: formula(base, adapters, rows, x), None):
        x = x_BTI.clone().requires_grad_()
        if function is not None:
            function(x).square().sum().backward()
        else:
            with engine.activate(rows):
                loss = base(x).square().sum()
            with torch.no_grad(), engine.activate([{"b": 9.0}, {"a": -7.0}]):
                base(x_BTI)
            loss.backward()
        found.append(x.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-5)
