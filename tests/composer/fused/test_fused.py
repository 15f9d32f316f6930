"""Fusing writes the formula into the weights, once, and takes every bit of it back."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_models import DTYPES, LAYER, MIXTURE, bits, small_adapter, small_engine, small_model
from import_statements import MODULES, imported
from tiny_models import Make
from torch import Tensor, nn

from loraweave import registry
from loraweave.composer.composer import Composer
from loraweave.errors import AlreadyActive, CompositionError, LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.registry import get
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors


@pytest.fixture
def engine(engine: Composer, tiny_llama: nn.Module) -> Iterator[Composer]:
    """A Composer whose model has every bit of the base at the end of each test, and nothing that is active."""
    before = bits(tiny_llama)
    yield engine
    assert bits(tiny_llama) == before
    assert not engine.active


def refused(engine: Composer, error: type[Exception], match: str, mixture: Any = None, **options: Any) -> None:
    with pytest.raises(error, match=match), engine.fused({"a": 1.0} if mixture is None else mixture, **options):
        pass


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


@pytest.mark.parametrize("dtype", DTYPES)
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


def test_a_method_with_a_dense_result_fuses_it(make_adapter: Make, tiny_llama: nn.Module) -> None:
    experts = [make_adapter(tiny_llama, name, rank=2, seed=seed) for seed, name in enumerate("ab")]
    dense = get("methods", "ties_per_layer")([expert.layers[LAYER] for expert in experts], [0.7, 0.4], density=0.5)
    weight = tiny_llama.get_submodule(LAYER).weight
    expected = weight.detach() + dense.delta_OI
    with Composer(tiny_llama, experts).fused({"a": 0.7, "b": 0.4}, method="ties_per_layer", density=0.5):
        assert torch.allclose(weight, expected, atol=1e-6)


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
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: by_data if folder == "methods" else get(folder, name))
    layers: Any = dict.fromkeys(engine.pool.layer_names, "recorded")
    checked: list[tuple[str, str]] = []
    own = SimpleNamespace(layers=layers, require_of=lambda *of: checked.append(of))
    with engine.fused({"a": 1.0}, method="by_data", statistics={"a": own}):
        pass
    with pytest.raises(WeightingError, match=r"none for expert 'b'.*collect_statistics"):
        engine.fused({"b": 1.0}, method="by_data", statistics={"a": own}).__enter__()
    assert checked == [("a", engine.pool.adapters["a"].hash)]


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


def test_what_mixes_live_imports_nothing_of_what_is_written_into_weights() -> None:
    live = {name: path for name, path in MODULES.items() if name.startswith("loraweave.composer.live.")}
    ours = {(name, other) for name, path in live.items() for other in imported(path, MODULES)}
    assert [pair for pair in ours if pair[1].startswith("loraweave.composer.fused")] == []
