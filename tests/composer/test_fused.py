"""Fusing writes the formula into the weights, once, and takes every bit of it back."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tiny_models import Make
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraweave.composer import fused as fuse
from loraweave.composer import overwritten
from loraweave.composer.composer import Composer
from loraweave.composer.merge.statistics import Statistics
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.composer.model.layers import TargetLayer
from loraweave.errors import AlreadyActive, CompositionError, LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.registry import get
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

LAYER = "model.layers.0.self_attn.q_proj"
MIXTURE = {"a": 0.7, "b": -0.4, "c": 1.3}


def bits(model: nn.Module) -> dict[str, tuple[int, int, bytes]]:
    """Which object each parameter is, where its memory is, and what is in it."""
    return {
        name: (id(p), p.data_ptr(), p.detach().view(torch.uint8).numpy().tobytes()) for name, p in model.named_parameters()
    }


@pytest.fixture
def engine(tiny_llama: nn.Module, make_adapters: Make) -> Iterator[Composer]:
    """A Composer whose model has every bit of the base at the end of each test, and nothing that is active."""
    before = bits(tiny_llama)
    made = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    yield made
    assert bits(tiny_llama) == before
    assert not made.active


def refused(engine: Composer, error: type[Exception], match: str, mixture: Any = None, **options: Any) -> None:
    with pytest.raises(error, match=match), engine.fused({"a": 1.0} if mixture is None else mixture, **options):
        pass


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Three layers, of both ways to store a weight, with odd sizes and biases."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), Conv1D(7, 3), nn.Linear(7, 9, bias=False))
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model.to(dtype)


def small_adapter(name: str, seed: int, layers: str = "012", *, bias: bool = True, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"0": (3, 5), "1": (7, 3), "2": (9, 7)}
    found = {}
    for layer in layers:
        num_outputs, num_inputs = sizes[layer]
        a_RI, b_OR = (torch.randn(*shape, generator=generator) for shape in ((rank, num_inputs), (num_outputs, rank)))
        bias_O = torch.randn(num_outputs, generator=generator) if bias and layer != "2" else None
        found[layer] = Factors(a_RI, b_OR, bias_O=bias_O)
    return Adapter(name, "tiny", found)


def small_engine(dtype: torch.dtype = torch.float32) -> Composer:
    layers = {"a": "01", "b": "12", "c": "012"}
    return Composer(
        small_model(dtype), [small_adapter(name, seed, layers[name], rank=seed) for seed, name in enumerate("abc", start=1)]
    )


def target(model: nn.Module, name: str) -> TargetLayer:
    module = model.get_submodule(name)
    rows, columns = module.weight.shape
    transposed = isinstance(module, Conv1D)
    return TargetLayer(name, module, columns if transposed else rows, rows if transposed else columns, transposed)


def small_updates(model: nn.Module, adapter: Adapter) -> list[fuse.Update]:
    return [(target(model, name), factors) for name, factors in adapter.layers.items()]


def fused(
    model: nn.Module, updates: Iterable[fuse.Update], place: overwritten.Place = "memory"
) -> AbstractContextManager[fuse.Fused]:
    return fuse.fused(model, lambda *mixture: (), updates, place)


@pytest.mark.parametrize(("place", "cycles"), [("memory", 1000), ("disk", 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_cycles_of_sixteen_adapters_give_back_every_bit(
    dtype: torch.dtype, place: overwritten.Place, cycles: int
) -> None:
    model = small_model(dtype)
    layers = ("0", "1", "01", "12")
    updates = [small_updates(model, small_adapter("a", seed, layers[seed % 4], rank=1 + seed % 3)) for seed in range(16)]
    before = bits(model)
    for cycle in range(cycles):
        with fused(model, updates[cycle % 16], place) as written:
            if cycle % 10 == 0:
                assert bits(model) != before
                written.write(updates[cycle % 7])
    assert bits(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cycles_on_a_transformer_give_back_every_bit(
    kind: str, dtype: torch.dtype, make_model: Make, make_adapters: Make
) -> None:
    model = make_model(kind, dtype=dtype)
    engine = Composer(model, make_adapters(model, kind))
    before = bits(model)
    for cycle in range(5):
        with engine.fused({"a": 1.0 + cycle, "b": -0.4, "c": 1.3}):
            assert bits(model) != before
    assert bits(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_weight_is_the_exact_one_rounded_once(dtype: torch.dtype, make_model: Make, make_adapters: Make) -> None:
    model = make_model("llama", dtype=dtype)
    adapters = make_adapters(model, "llama")
    weight = model.get_submodule(LAYER).weight
    exact = weight.detach().double()
    for adapter in adapters:
        if LAYER in adapter.layers:
            exact = exact + MIXTURE[adapter.name] * adapter.delta(LAYER).double()
    with Composer(model, adapters).fused(MIXTURE):
        error = (weight.double() - exact).abs()
    # half a unit in the last place, and fp32's own rounding on top
    assert bool((error <= exact.abs() * torch.finfo(dtype).eps * 0.5 + 1e-5).all())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_gives_back_every_bit(error: type[BaseException], engine: Composer) -> None:
    with pytest.raises(error), engine.fused(MIXTURE):
        raise error


@contextmanager
def interrupted_at(number: int, error: type[BaseException]) -> Iterator[list[int]]:
    """Raises `error` before the line of that number that runs in the files of fusing; the list counts such lines."""
    files = {fuse.__file__, overwritten.__file__}
    count = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                raise error
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(outer)


def test_an_interruption_at_any_line_gives_back_every_bit() -> None:
    model = small_model()
    before = bits(model)
    first, second = (small_updates(model, small_adapter("a", seed, layers)) for seed, layers in enumerate(("01", "12")))
    number, count = 0, [0]
    while count[0] == number:
        number += 1
        with suppress(KeyboardInterrupt), interrupted_at(number, KeyboardInterrupt) as count, fused(model, first) as written:
            written.write(second)
        assert bits(model) == before, f"line {number}"
        assert not any(module in overwritten.OVERWRITTEN for module in model.modules()), f"line {number}"
    assert number > 500


def test_an_error_about_one_parameter_does_not_keep_the_others_from_coming_back(
    tiny_llama: nn.Module, make_adapters: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    before = bits(engine.model)
    original = overwritten.Overwritten.restore
    broken = f"{LAYER}.weight"

    def restore(kept: Any) -> None:
        if kept.name == broken:
            raise RuntimeError("device lost")
        original(kept)

    with pytest.raises(RuntimeError, match="device lost"), engine.fused(MIXTURE):
        monkeypatch.setattr(overwritten.Overwritten, "restore", restore)
    after = bits(engine.model)
    assert [name for name in before if after[name] != before[name]] == [broken]


@pytest.mark.parametrize(
    ("dtype", "size", "says"),
    [
        (torch.float16, 300.0, r"'2\.weight'.*float.*at most; use smaller weights"),
        (torch.float32, 1e20, r"layer '2': the update of 'a' is up to 1e\+40.*at most; use a smaller weight"),
        (torch.bfloat16, 1e20, r"layer '2': the update of 'a' is up to 1e\+40.*at most; use a smaller weight"),
    ],
    ids=["fp16", "fp32", "bf16"],
)
def test_values_beyond_the_dtype_are_refused_before_anything_is_written(dtype: torch.dtype, size: float, says: str) -> None:
    model = small_model(dtype)
    versions = [p._version for p in model.parameters()]
    large = Factors(torch.full((1, 7), size), torch.full((9, 1), size))
    engine = Composer(model, [Adapter("a", "tiny", {**small_adapter("a", 0, "01").layers, "2": large})])
    with pytest.raises(CompositionError, match=says), engine.fused({"a": 1.0}):
        pass
    assert [p._version for p in model.parameters()] == versions
    assert not engine.active


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", ["0", "1"])
def test_a_dense_update_is_added_as_it_is(layer: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    before = bits(model)
    place = target(model, layer)
    generator = torch.Generator().manual_seed(1)
    delta_OI = torch.randn(place.num_outputs, place.num_inputs, generator=generator)
    bias_O = torch.randn(place.num_outputs, generator=generator)
    stored = delta_OI.T if place.transposed else delta_OI
    expected = (place.module.weight.detach().float() + stored).to(dtype)
    expected_bias = (place.module.bias.detach().float() + bias_O).to(dtype)
    with fused(model, [(place, DenseUpdate(delta_OI, bias_O))]):
        assert torch.equal(place.module.weight, expected)
        assert torch.equal(place.module.bias, expected_bias)
    assert bits(model) == before


@pytest.mark.parametrize("block", [1, 8, 40], ids=["row by row", "two rows", "more than there are"])
def test_the_size_of_the_blocks_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(torch.float64)
    with engine.fused(MIXTURE):
        expected = [p.detach().clone() for p in engine.model.parameters()]
    monkeypatch.setattr(overwritten, "BLOCK", block)
    with engine.fused(MIXTURE):
        assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(engine.model.parameters(), expected, strict=True))


def test_a_method_with_a_dense_result_fuses_it(make_adapter: Make, tiny_llama: nn.Module) -> None:
    experts = [make_adapter(tiny_llama, name, rank=2, seed=seed) for seed, name in enumerate("ab")]
    dense = get("methods", "ties_per_layer")([expert.layers[LAYER] for expert in experts], [0.7, 0.4], density=0.5)
    weight = tiny_llama.get_submodule(LAYER).weight
    expected = weight.detach() + dense.delta_OI
    with Composer(tiny_llama, experts).fused({"a": 0.7, "b": 0.4}, method="ties_per_layer", density=0.5):
        assert torch.allclose(weight, expected, atol=1e-6)


def test_one_update_is_held_at_a_time() -> None:
    model = small_model()
    alive: list[weakref.ref[Any]] = []

    def updates() -> Iterator[fuse.Update]:
        for name in "012":
            assert not any(reference() is not None for reference in alive[:-1])
            place = target(model, name)
            update = DenseUpdate(torch.ones(place.num_outputs, place.num_inputs))
            alive.append(weakref.ref(update))
            yield place, update

    with fused(model, updates()):
        assert len(alive) == 3


def test_originals_take_the_bytes_of_what_is_written_in_whole_pages(engine: Composer) -> None:
    with engine.fused(MIXTURE) as now:
        written = [p for name, p in engine.model.named_parameters() if name.rpartition(".")[0] in engine.pool.layer_names]
        assert now.original_bytes == len(written) * 4096


def test_originals_on_disk_have_no_name_that_another_process_could_open(
    engine: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with engine.fused(MIXTURE, originals="disk"):
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(engine: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    refused(engine, CompositionError, r"TMPDIR.*originals='memory'", MIXTURE, originals="disk")


def test_another_place_for_originals_is_refused(engine: Composer) -> None:
    refused(engine, CompositionError, "originals='cloud' is neither", MIXTURE, originals="cloud")


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_switching_gives_the_bits_of_fusing_afresh(dtype: torch.dtype, place: overwritten.Place) -> None:
    engine = small_engine(dtype)
    before = bits(engine.model)
    mixtures: list[dict[str, float]] = [{"a": 0.5, "c": 1.0}, {"b": 2.0}, {}, {"a": -1.0}, {"c": 0.3, "b": 0.1}]
    expected = []
    for mixture in mixtures:
        with engine.fused(mixture):
            expected.append(bits(engine.model))
    with engine.fused(mixtures[-1], originals=place) as now:
        for mixture, wanted in zip(mixtures, expected, strict=True):
            now.switch(mixture)
            assert bits(engine.model) == wanted
    assert bits(engine.model) == before


def test_a_switch_that_is_refused_changes_nothing(engine: Composer) -> None:
    with engine.fused(MIXTURE) as now:
        before = bits(engine.model)
        with pytest.raises(UnknownName):
            now.switch({"a": 1.0}, method="linaer")
        with pytest.raises(ScopeError):
            now.switch([{"a": 1.0}, None])
        assert bits(engine.model) == before


def test_a_switch_that_fails_half_way_leaves_the_base() -> None:
    large = Factors(torch.full((1, 7), 1e20), torch.full((9, 1), 1e20))
    unsound = Adapter("unsound", "tiny", {**small_adapter("a", 0, "01").layers, "2": large})
    engine = Composer(small_model(), [small_adapter("a", 1), unsound])
    base = bits(engine.model)
    with engine.fused({"a": 1.0}) as now:
        with pytest.raises(CompositionError, match="layer '2'"):
            now.switch({"unsound": 1.0})
        assert bits(engine.model) == base
        now.switch({"a": 1.0})
        assert bits(engine.model) != base
    assert bits(engine.model) == base


def test_a_switch_does_not_write_over_what_others_have_changed(engine: Composer) -> None:
    module = engine.model.get_submodule(LAYER)
    block = engine.fused(MIXTURE)
    now = block.__enter__()
    change_weight(module, "data")
    mine = module.weight.detach().clone()
    with pytest.raises(CompositionError, match="would overwrite"):
        now.switch({"a": 1.0})
    assert torch.equal(module.weight, mine)
    with pytest.raises(CompositionError, match="are back"):
        block.__exit__(None, None, None)


def test_a_handle_outlives_its_block_without_effect(engine: Composer) -> None:
    with engine.fused(MIXTURE) as now:
        pass
    with pytest.raises(CompositionError, match="has ended"):
        now.switch({"a": 1.0})


def test_switching_in_one_thread_and_leaving_in_another_ends_with_the_base(engine: Composer) -> None:
    refused = threading.Event()

    def switch(now: Any) -> None:
        while True:
            try:
                now.switch({"b": 1.0})
            except CompositionError:
                refused.set()
                return

    with engine.fused(MIXTURE) as now:
        thread = threading.Thread(target=switch, args=(now,))
        thread.start()
    thread.join(timeout=20)
    assert refused.is_set()


def test_a_model_made_in_inference_mode_is_fused_and_restored() -> None:
    with torch.inference_mode():
        model = small_model()
        before = bits(model)
    with Composer(model, [small_adapter("a", 1)]).fused({"a": 1.0}):
        assert all(new != old for new, old in zip(bits(model).values(), before.values(), strict=True))
    assert bits(model) == before


def test_fusing_below_inference_mode_and_leaving_outside_it_works() -> None:
    engine = small_engine()
    before = bits(engine.model)
    block = engine.fused(MIXTURE)
    with torch.inference_mode():
        now = block.__enter__()
    now.switch({"a": 1.0})
    block.__exit__(None, None, None)
    assert bits(engine.model) == before


def by_data(experts: list[Factors], weights: list[float], *, statistics: list[Any]) -> Factors:
    assert statistics == ["recorded"]
    return experts[0]


def test_a_method_that_weighs_by_data_gets_the_statistics_of_its_experts(
    engine: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraweave.registry.get", lambda folder, name: by_data)
    layers: Any = dict.fromkeys(engine.pool.layer_names, "recorded")
    own = Statistics(engine.pool.adapters["a"].hash, layers)
    with engine.fused({"a": 1.0}, method="by_data", statistics={"a": own}):
        pass
    with pytest.raises(WeightingError, match=r"none for expert 'b'.*collect_statistics"):
        engine.fused({"b": 1.0}, method="by_data", statistics={"a": own}).__enter__()
    with pytest.raises(WeightingError, match=r"given for 'b' \(hash .*with an adapter of hash"):
        engine.fused({"b": 1.0}, method="by_data", statistics={"b": own}).__enter__()


@torch.no_grad()
def change_weight(module: nn.Module, how: str) -> None:
    if how == "value":
        module.weight[0, 0] += 1
    elif how == "data":
        module.weight.data.mul_(2)
    else:
        module.weight = nn.Parameter(module.weight.clone())


@pytest.mark.parametrize("change", ["value", "data", "object"])
def test_a_change_by_others_is_told_and_taken_back(change: str, engine: Composer) -> None:
    module = engine.model.get_submodule(LAYER)
    with pytest.raises(CompositionError, match=rf"{LAYER}\.weight"), engine.fused(MIXTURE):
        change_weight(module, change)


def test_a_change_by_others_does_not_hide_the_exception_in_flight(engine: Composer) -> None:
    def careless() -> None:
        with engine.fused(MIXTURE):
            change_weight(engine.model.get_submodule(LAYER), "value")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        careless()
    assert any(LAYER in note for note in caught.value.__notes__)


def test_a_model_that_changes_its_dtype_while_fused_comes_back_in_that_dtype(make_adapters: Make, make_model: Make) -> None:
    model = make_model("llama")
    engine = Composer(model, make_adapters(model, "llama"))
    with engine.fused(MIXTURE):
        engine.model.to(torch.bfloat16)
    expected = make_model("llama").to(torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), expected.parameters(), strict=True))


def test_fusing_nothing_touches_nothing(engine: Composer) -> None:
    before = {name: p._version for name, p in engine.model.named_parameters()}
    with engine.fused({"a": 0.0}):
        assert {name: p._version for name, p in engine.model.named_parameters()} == before


class _AnyRouter:
    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return torch.ones(1, 1, 3)


@pytest.mark.parametrize(
    "mixture",
    [[{"a": 1.0}, None], MixtureWeights(torch.ones(1, 2, 1, 3), ("a", "b", "c")), _AnyRouter()],
    ids=["rows", "tokens", "router"],
)
def test_weights_that_vary_with_the_input_are_refused(mixture: Any, engine: Composer) -> None:
    refused(engine, ScopeError, r"activate\(\) them instead", mixture)


def test_tied_weights_are_refused_with_both_names(make_model: Make, make_adapter: Make) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    engine = Composer(model, [make_adapter(model, "a", targets=("q_proj", "lm_head"))])
    before = bits(model)
    refused(engine, CompositionError, r"lm_head\.weight.*model\.embed_tokens\.weight")
    assert bits(model) == before
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        base = model(ids).logits
        # live, the embedding stays what it is
        with engine.activate({"a": 1.0}):
            assert not torch.allclose(model(ids).logits, base, atol=1e-2)


def test_tensors_side_by_side_in_one_memory_are_not_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    memory = torch.randn(12)
    model[0].weight.data = memory[:6].view(2, 3)
    model[1].weight.data = memory[6:].view(3, 2)
    before = memory.clone()
    with Composer(model, [Adapter("a", "tiny", {"0": Factors(torch.ones(1, 3), torch.ones(2, 1))})]).fused({"a": 1.0}):
        assert torch.equal(memory[6:], before[6:])
        assert torch.allclose(memory[:6], before[:6] + 1)
    assert torch.equal(memory, before)


def test_a_bias_without_a_place_is_refused(tiny_llama: nn.Module, make_adapter: Make) -> None:
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, "a", bias=True)])
    refused(engine, CompositionError, r"q_proj.*has none; activate\(\)")


def test_weights_without_values_are_refused(make_adapter: Make) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    engine = Composer(model, [Adapter("a", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))})])
    model.to("meta")
    refused(engine, CompositionError, "meta")


def test_packed_weights_are_refused_but_mix_live() -> None:
    class Packed(nn.Linear):
        """A linear layer that stores integers, as quantised ones do."""

        def __init__(self) -> None:
            super().__init__(4, 3, bias=False)
            self.weight = nn.Parameter(torch.ones(6, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(dim=-1, keepdim=True).expand(*x.shape[:-1], 3)

    model = nn.Sequential(Packed())
    engine = Composer(model, [Adapter("a", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))})])
    x = torch.ones(2, 5, 4)
    with engine.activate({"a": 0.5}):
        assert torch.equal(model(x), torch.full((2, 5, 3), 6.0))
    refused(engine, CompositionError, r"uint8 \(6, 1\)")


def test_a_weight_computed_on_the_way_is_refused() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    engine = Composer(model, [Adapter("a", "tiny", {name: Factors(torch.ones(1, 4), torch.ones(3, 1))})])
    refused(engine, CompositionError, "computed on the way")


def test_a_factor_method_fuses_its_own_formula(tiny_llama: nn.Module, make_adapter: Make) -> None:
    a, b = (make_adapter(tiny_llama, name, rank=2, seed=seed) for seed, name in enumerate("ab"))
    weight = tiny_llama.get_submodule(LAYER).weight
    f, g = a.layers[LAYER], b.layers[LAYER]
    expected = weight.detach() + (0.7 * f.b_OR - 0.4 * g.b_OR) @ (0.7 * f.a_RI - 0.4 * g.a_RI)
    with Composer(tiny_llama, [a, b]).fused({"a": 0.7, "b": -0.4}, method="factor_sum"):
        assert torch.allclose(weight, expected, atol=1e-5)


def test_a_method_that_refuses_names_layer_and_experts(engine: Composer) -> None:
    with (
        pytest.raises(LayerMismatch, match=r"layer 'model.*'b', 'c'.*equal ranks"),
        engine.fused({"b": 1.0, "c": 1.0}, method="factor_sum"),
    ):
        pass


def test_a_composer_is_not_made_from_fused_weights(engine: Composer) -> None:
    with engine.fused(MIXTURE), pytest.raises(AlreadyActive, match="not the base's"):
        Composer(engine.model, engine.pool)
    Composer(engine.model, engine.pool)
