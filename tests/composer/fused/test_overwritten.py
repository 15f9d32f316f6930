"""Weights that are written over come back bit for bit, after many cycles, interruptions, errors and switches."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
import torch
from fused_models import DTYPES, LAYER, MIXTURE, bits, small_adapter, small_engine, small_model
from tiny_models import Make
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraweave.composer.composer import Composer
from loraweave.composer.fused import fused as fuse
from loraweave.composer.fused import overwritten
from loraweave.composer.merge.method_call import DenseUpdate
from loraweave.composer.model.layers import OVERWRITTEN, TargetLayer
from loraweave.errors import CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


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
        assert not any(module in OVERWRITTEN for module in model.modules()), f"line {number}"
    assert number > 500


@pytest.mark.own_models
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
