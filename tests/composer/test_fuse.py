"""Fusing writes the formula into the weights, once, and takes every bit of it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraweave.composer import fuse
from loraweave.composer.composer import Composer
from loraweave.errors import AlreadyActive, CompositionError, LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Factors

LAYER = "model.layers.0.self_attn.q_proj"
MIXTURE = {"a": 0.7, "b": -0.4, "c": 1.3}


def bits(model: nn.Module) -> dict[str, tuple[int, int, bytes]]:
    """Which object each parameter is, where its memory is, and what is in it."""
    return {
        name: (id(p), p.data_ptr(), p.detach().view(torch.uint8).numpy().tobytes()) for name, p in model.named_parameters()
    }


@pytest.fixture
def engine(tiny_llama: nn.Module, make_adapters: Callable[..., list[Adapter]]) -> Composer:
    return Composer(tiny_llama, make_adapters(tiny_llama, "llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fifty_cycles_give_back_every_bit(
    kind: str, dtype: torch.dtype, make_model: Callable[..., nn.Module], make_adapters: Callable[..., list[Adapter]]
) -> None:
    model = make_model(kind, dtype=dtype)
    engine = Composer(model, make_adapters(model, kind))
    before = bits(model)
    for cycle in range(50):
        with engine.fused({"a": 1.0 + cycle, "b": -0.4, "c": 1.3}):
            assert bits(model) != before
    assert bits(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_weight_is_the_exact_one_rounded_once(
    dtype: torch.dtype, make_model: Callable[..., nn.Module], make_adapters: Callable[..., list[Adapter]]
) -> None:
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
    before = bits(engine.model)
    with pytest.raises(error), engine.fused(MIXTURE):
        raise error
    assert bits(engine.model) == before
    assert not engine.active


@pytest.mark.parametrize("late", [False, True], ids=["before the copy", "after the copy"])
def test_an_interruption_at_any_layer_of_fusing_gives_back_every_bit(
    late: bool, engine: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(engine.model)
    num_layers = len(engine.pool.layer_names)
    original = fuse._put
    for stop_at in range(num_layers):
        calls = 0

        def interrupted(*args: Any, stop_at: int = stop_at) -> None:
            nonlocal calls
            calls += 1
            if calls - 1 == stop_at:
                if late:
                    original(*args)
                raise KeyboardInterrupt
            original(*args)

        monkeypatch.setattr(fuse, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt), engine.fused(MIXTURE):
            pytest.fail("the block must not be entered")
        assert calls == stop_at + 1
        assert bits(engine.model) == before
        assert not engine.active
        assert not any(map(fuse.is_fused, engine.model.modules()))


@pytest.mark.parametrize("action", ["restore", "changed"])
def test_an_interruption_at_any_layer_of_restoring_gives_back_every_bit(
    action: str, engine: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(engine.model)
    original = getattr(fuse._Kept, action)
    for stop_at in range(len(engine.pool.layer_names)):
        calls = 0

        def interrupted(kept: Any, stop_at: int = stop_at) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 == stop_at:
                raise KeyboardInterrupt
            return original(kept)

        monkeypatch.setattr(fuse._Kept, action, interrupted)
        with pytest.raises(KeyboardInterrupt), engine.fused(MIXTURE):
            pass
        assert bits(engine.model) == before
        assert not engine.active


def test_an_adapter_that_is_not_finite_is_taken_out_again(tiny_llama: nn.Module) -> None:
    before = bits(tiny_llama)
    engine = Composer(
        tiny_llama, [Adapter("a", "tiny", {LAYER: Factors(torch.full((1, 16), torch.nan), torch.ones(16, 1))})]
    )
    with engine.fused({"a": 1.0}):
        assert bool(tiny_llama.get_submodule(LAYER).weight.isnan().any())
    assert bits(tiny_llama) == before


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
    before = bits(engine.model)
    module = engine.model.get_submodule(LAYER)
    with pytest.raises(CompositionError, match=rf"{LAYER}\.weight"), engine.fused(MIXTURE):
        change_weight(module, change)
    assert bits(engine.model) == before
    assert not engine.active


def test_a_change_by_others_does_not_hide_the_exception_in_flight(engine: Composer) -> None:
    def careless() -> None:
        with engine.fused(MIXTURE):
            change_weight(engine.model.get_submodule(LAYER), "value")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        careless()
    assert any(LAYER in note for note in caught.value.__notes__)


def test_a_model_that_changes_its_dtype_while_fused_comes_back_in_that_dtype(
    engine: Composer, make_model: Callable[..., nn.Module]
) -> None:
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
    before = bits(engine.model)
    with pytest.raises(ScopeError, match=r"activate\(\) them instead"), engine.fused(mixture):
        pass
    assert bits(engine.model) == before


def test_tied_weights_are_refused_with_both_names(
    make_model: Callable[..., nn.Module], make_adapter: Callable[..., Adapter]
) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    engine = Composer(model, [make_adapter(model, "a", targets=("q_proj", "lm_head"))])
    before = bits(model)
    with pytest.raises(CompositionError, match=r"lm_head\.weight.*model\.embed_tokens\.weight"), engine.fused({"a": 1.0}):
        pass
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


def test_a_bias_without_a_place_is_refused(tiny_llama: nn.Module, make_adapter: Callable[..., Adapter]) -> None:
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, "a", bias=True)])
    with pytest.raises(CompositionError, match=r"q_proj.*has none; activate\(\)"), engine.fused({"a": 1.0}):
        pass


def test_weights_without_values_are_refused(make_adapter: Callable[..., Adapter]) -> None:
    model = nn.Sequential(nn.Linear(4, 3, device="meta"))
    engine = Composer(model, [Adapter("a", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))})])
    with pytest.raises(CompositionError, match="meta"), engine.fused({"a": 1.0}):
        pass


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
    with pytest.raises(CompositionError, match=r"uint8 \(6, 1\)"), engine.fused({"a": 1.0}):
        pass


def test_a_weight_computed_on_the_way_is_refused() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    engine = Composer(model, [Adapter("a", "tiny", {name: Factors(torch.ones(1, 4), torch.ones(3, 1))})])
    with pytest.raises(CompositionError, match="computed on the way"), engine.fused({"a": 1.0}):
        pass


def test_an_unknown_method_or_option_is_named_with_the_nearest(engine: Composer) -> None:
    with pytest.raises(UnknownName, match="did you mean 'linear'"), engine.fused(MIXTURE, method="linaer"):
        pass
    with pytest.raises(WeightingError, match=r"no option 'density'.*no options"), engine.fused(MIXTURE, density=0.5):
        pass


def test_a_factor_method_fuses_its_own_formula(tiny_llama: nn.Module, make_adapter: Callable[..., Adapter]) -> None:
    a, b = (make_adapter(tiny_llama, name, rank=2, seed=seed) for seed, name in enumerate("ab"))
    weight = tiny_llama.get_submodule(LAYER).weight
    f, g = a.layers[LAYER], b.layers[LAYER]
    expected = weight.detach() + (0.7 * f.b_OR - 0.4 * g.b_OR) @ (0.7 * f.a_RI - 0.4 * g.a_RI)
    with Composer(tiny_llama, [a, b]).fused({"a": 0.7, "b": -0.4}, method="factor_sum"):
        assert torch.allclose(weight, expected, atol=1e-5)


def test_a_method_that_refuses_names_layer_and_experts(engine: Composer) -> None:
    before = bits(engine.model)
    with (
        pytest.raises(LayerMismatch, match=r"layer 'model.*'b', 'c'.*equal ranks"),
        engine.fused({"b": 1.0, "c": 1.0}, method="factor_sum"),
    ):
        pass
    assert bits(engine.model) == before
    assert not engine.active


def test_a_composer_is_not_made_from_fused_weights(engine: Composer) -> None:
    with engine.fused(MIXTURE), pytest.raises(AlreadyActive, match="not the base's"):
        Composer(engine.model, engine.pool)
    Composer(engine.model, engine.pool)
