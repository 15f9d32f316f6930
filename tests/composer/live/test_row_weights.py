"""A row of a batch is what it would be alone, whichever path its mixture takes, and whoever its neighbours are."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_models import logits
from rounding import assert_near, num_terms
from torch import nn

from loraweave import registry
from loraweave.composer.composer import Composer
from loraweave.composer.live import row_weights
from loraweave.composer.live.kernels._parts import own_precision
from loraweave.composer.live.row_weights import Workspace
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

WEIGHT = st.floats(-2, 2, width=32)
ROW = st.one_of(st.none(), st.dictionaries(st.sampled_from("abc"), WEIGHT, max_size=3))
# with those that extensions bring
BY_ROW = tuple(name for name in ("gathered", "segments", "dense") if name in registry.names("kernels"))
SHARED = tuple(name for name in ("merged", "shared") if name in registry.names("kernels"))


def scale(values):
    return float(values.abs().max())


def magnitudes(model, adapters, row, x):
    """What a layer's sums would be if no term had a sign."""
    layer, x = model[0], x.abs()
    total = x @ layer.weight.abs().T + layer.bias.abs()
    for adapter in adapters:
        factors = adapter.layers["0"]
        a_RI, b_OR = factors.a_RI.abs().to(x), factors.b_OR.abs().to(x)
        total = total + abs(row.get(adapter.name, 0.0)) * (x @ a_RI.T) @ b_OR.T
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=1, max_size=5), tokens=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_row_of_a_layer_is_what_it_is_alone(make_adapter, dtype, rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40)).to(dtype)
    adapters = [
        make_adapter(model, name, rank=rank, targets=("0",), seed=rank) for name, rank in zip("abc", (1, 4, 3), strict=True)
    ]
    engine = Composer(model, adapters)
    x_BTI = torch.randn(len(rows), tokens, 24, generator=generator, dtype=dtype)
    with torch.no_grad():
        with engine.activate(rows):
            together = model(x_BTI)
        for number, row in enumerate(rows):
            # as many rows, since the base's own products depend on their number by some bits
            with engine.activate(row or {}):
                alone = model(x_BTI[number].repeat(len(rows), 1, 1))[number]
            # the layer's inputs and the rank rows of all experts
            assert_near(together[number], alone, 24 + 8, magnitudes(model, adapters, row or {}, x_BTI[number]))
            assert row or torch.equal(together[number], alone)


@pytest.mark.parametrize("path", BY_ROW)
def test_padding_changes_no_row(path, tiny_llama, engine, monkeypatch):
    monkeypatch.setattr(row_weights, "choose", lambda work: row_weights.Choice(path if work.num_segments > 1 else "shared"))
    rows = [{"a": 1.0}, {"b": -0.5, "c": 0.3}]
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with engine.activate(rows):
        padded = logits(tiny_llama, ids, attention_mask=mask)[0, 3:]
        padded_otherwise = logits(tiny_llama, torch.where(mask == 1, ids, 7), attention_mask=mask)[0, 3:]
    with engine.activate(rows[0]):
        alone = logits(tiny_llama, ids[:1, 3:])[0]
    assert torch.equal(padded, padded_otherwise)
    assert_near(padded, alone, num_terms(tiny_llama))


@pytest.mark.parametrize("path", BY_ROW)
def test_neighbours_of_the_same_ranks_change_no_bit(path, tiny_llama, make_adapter, monkeypatch):
    monkeypatch.setattr(row_weights, "choose", lambda work: row_weights.Choice(path))
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, name, rank=3, seed=seed) for seed, name in enumerate("abcd")])
    ids = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(1))
    found = []
    for neighbours in (["a", "c"], ["d", "a"]):
        with engine.activate([{"b": 0.7}, *({name: -1.0} for name in neighbours)]):
            found.append(logits(tiny_llama, torch.cat([ids[:1], ids[1:] + len(found)]))[0])
    if path == "dense":
        # its sums run over all experts of the batch, whose zeros may be added in another order
        assert_near(found[0], found[1], num_terms(tiny_llama))
    else:
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("exact", [False, True], ids=["own dtype", "fp32"])
@pytest.mark.parametrize("path", [*BY_ROW, *SHARED])
def test_every_path_is_the_dense_formula_in_a_whole_model(
    path, exact, make_model, make_adapters, with_dense_update, monkeypatch
):
    monkeypatch.setattr(row_weights, "choose", lambda work: row_weights.Choice(path, exact))
    dtype = torch.bfloat16 if exact else torch.float64
    model = make_model("llama", dtype=dtype)
    adapters = make_adapters(model, "llama")
    ids = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(1))
    weights = [(0.75, -0.25, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)] if path in BY_ROW else [(0.75, -0.25, 0.5)]
    rows = [dict(zip("abc", values, strict=True)) for values in weights]
    with Composer(model, adapters).activate(rows if len(rows) > 1 else rows[0]):
        for _ in range(2):
            found = logits(model, ids)
    for number in range(3):
        values = weights[number if len(weights) > 1 else 0]
        expected = logits(with_dense_update("llama", adapters, values, dtype=torch.float64), ids)[number].double()
        limit = 0.1 if exact else 1e-12
        assert float((found[number].double() - expected).abs().max()) <= limit * scale(expected)


ROWS = [{"plain": 1.0}, {"gain": 1.0}, None, {"bias": 1.0}]
BY_TOKEN = MixtureWeights(
    torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]).view(4, 1, 1, 3).expand(4, 2, 1, 3),
    ("plain", "gain", "bias"),
)


@pytest.mark.parametrize("mixture", [ROWS, BY_TOKEN], ids=["by row", "by token"])
@torch.no_grad()
def test_a_neighbours_gain_changes_no_row_whose_base_has_overflowed(mixture):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).half()
    model[0].weight.fill_(3e4)
    a_RI, b_OR, gain_O, bias_O = torch.ones(1, 4), torch.ones(3, 1), torch.full((3,), 0.5), torch.ones(3)
    experts = {"plain": Factors(a_RI, b_OR), "gain": Factors(a_RI, b_OR, gain_O), "bias": Factors(a_RI, b_OR, None, bias_O)}
    engine = Composer(model, [Adapter(name, "tiny", {"0": factors}) for name, factors in experts.items()])
    x_BTI = torch.ones(4, 2, 4).half()
    with engine.activate(mixture):
        assert torch.equal(model(x_BTI), torch.full((4, 2, 3), torch.inf).half())


CPU = torch.device("cpu")


def test_what_was_given_back_is_taken_again_by_its_like_only():
    workspace = Workspace(1000)
    first = workspace.take(10, torch.float32, CPU)
    workspace.give([first])
    assert workspace.take(10, torch.float64, CPU).data_ptr() != first.data_ptr()
    assert workspace.take(11, torch.float32, CPU).data_ptr() != first.data_ptr()
    assert workspace.take(10, torch.float32, CPU) is first
    assert workspace.take(10, torch.float32, CPU) is not first
    assert workspace.num_bytes == 0


def test_the_kinds_longest_unused_go_first():
    workspace = Workspace(100)
    old, new = (workspace.take(size, torch.float32, CPU) for size in (15, 20))
    workspace.give([old])
    workspace.give([new])
    assert workspace.num_bytes == 80
    assert workspace.take(15, torch.float32, CPU) is not old
    assert workspace.take(20, torch.float32, CPU) is new


@pytest.mark.parametrize("affine", [False, True], ids=["factors", "gain and bias"])
@pytest.mark.parametrize("path", SHARED)
def test_a_mixture_first_used_below_autocast_is_exact_outside_it(path, affine, monkeypatch):
    monkeypatch.setattr(row_weights, "choose", lambda work: row_weights.Choice(path))
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(7, 5)
    a_RI, b_OR, gain_O, bias_O = (torch.randn(*shape, generator=generator) for shape in ((3, 7), (5, 3), (5,), (5,)))
    factors = Factors(a_RI, b_OR, gain_O, bias_O) if affine else Factors(a_RI, b_OR)
    engine = Composer(nn.Sequential(linear), [Adapter("a", "tiny", {"0": factors})])
    x = torch.randn(2, 3, 7, generator=generator)
    with torch.no_grad():
        update = x.double() @ (b_OR.double() @ a_RI.double()).T
        if affine:
            update += gain_O * (x.double() @ linear.weight.double().T) + bias_O
        wanted = linear(x).double() + 0.3 * update
        with engine.activate({"a": 0.3}), torch.autocast("cpu", torch.bfloat16):
            engine.model(x)
        with engine.activate({"a": 0.3}):
            found = engine.model(x)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_device_without_autocast_needs_nothing():
    with own_precision(torch.device("meta")):
        assert (torch.empty(2, 3, device="meta") @ torch.empty(3, 2, device="meta")).dtype == torch.float32
