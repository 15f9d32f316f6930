"""What a Composer checks before anything changes, and which states forbid what."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import Make, logits
from tiny_models import model_inputs as inputs
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.errors import AlreadyActive, BaseModelMismatch, CompositionError, LayerMismatch, UnknownExpert, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import fingerprint
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", ["mlp", "0", "a/b", "v_proj", "🧶", "", "model.layers.0"])
def test_any_text_is_a_name(name: str, tiny_llama: nn.Module, make_adapter: Make) -> None:
    adapter = make_adapter(tiny_llama, "plain")
    with Composer(tiny_llama, [adapter]).activate({"plain": 1.0}):
        expected = logits(tiny_llama, inputs("llama"))
    with Composer(tiny_llama, {name: adapter}).activate({name: 1.0}):
        assert torch.equal(logits(tiny_llama, inputs("llama")), expected)


def refused(model: nn.Module, layer: str, factors: Factors) -> str:
    with pytest.raises(LayerMismatch) as caught:
        Composer(model, [Adapter("odd", "tiny", {layer: factors})])
    return str(caught.value)


def test_a_layer_that_the_model_lacks_is_named_with_the_nearest(tiny_llama: nn.Module) -> None:
    message = refused(tiny_llama, LAYER.replace("layers", "layer"), Factors(torch.ones(1, 16), torch.ones(16, 1)))
    assert "'odd'" in message
    assert LAYER in message


def test_another_shape_is_named_with_both(tiny_llama: nn.Module) -> None:
    message = refused(tiny_llama, LAYER, Factors(torch.ones(1, 15), torch.ones(16, 1)))
    assert "(16, 15)" in message
    assert "(16, 16)" in message


def test_an_adapter_for_another_base_is_refused(make_model: Make, make_adapter: Make) -> None:
    model, other = make_model("llama"), make_model("llama", intermediate_size=20)
    adapter = make_adapter(model, "a")
    Composer(model, [replace(adapter, fingerprint=fingerprint(model))])
    with pytest.raises(BaseModelMismatch, match="'a'"):
        Composer(other, [replace(adapter, fingerprint=fingerprint(model))])


@pytest.mark.parametrize(
    ("mixture", "error"),
    [
        ({"z": 1.0}, UnknownExpert),
        ({"a": float("nan")}, WeightingError),
        ([{"a": 1.0}, {"b": float("inf")}], WeightingError),
        ([], WeightingError),
        ("a", WeightingError),
        (None, WeightingError),
        (0.5, WeightingError),
        ([0.5, 0.5, 0.5], WeightingError),
        (MixtureWeights(torch.ones(1, 1, 1, 1), ("z",)), UnknownExpert),
        (MixtureWeights(torch.ones(1, 1, 1, 2), ("a", "a")), WeightingError),
        (MixtureWeights(torch.ones(1, 1, 1, 1), ("a",), ("no.such.layer",)), WeightingError),
    ],
)
def test_mixtures_that_do_not_fit_raise_and_leave_nothing(mixture: Any, error: type[Exception], engine: Composer) -> None:
    with pytest.raises(error):
        engine.activate(mixture)
    assert not engine.active


def test_a_near_miss_of_a_layers_name_is_named(engine: Composer) -> None:
    misspelt = LAYER.replace("self_attn", "selfattn")
    with pytest.raises(WeightingError, match=f"layer '{misspelt}'.* did you mean '{LAYER}'"):
        engine.activate(MixtureWeights(torch.ones(1, 1, 1, 1), ("a",), (misspelt,)))


def test_a_router_of_the_wrong_shape_is_named(tiny_llama: nn.Module, make_adapters: Make) -> None:
    class TooFew:
        def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
            return torch.ones(1, 1, 2)

    with (
        Composer(tiny_llama, make_adapters(tiny_llama, "llama")).activate(TooFew()),
        pytest.raises(WeightingError, match=r"TooFew.*\(1, 1, 2\).*3 experts"),
    ):
        logits(tiny_llama, inputs("llama"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_router_of_weights_that_are_no_numbers_is_named_with_layer_and_expert(
    bad: float, tiny_llama: nn.Module, make_adapters: Make
) -> None:
    class Broken:
        def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
            w_BTE = torch.ones(*x_BTI.shape[:2], 3)
            if layer == LAYER:
                w_BTE[0, 1, 2] = bad
            return w_BTE

    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    with engine.activate(Broken()), pytest.raises(WeightingError, match=f"layer '{LAYER}' are not finite.* expert 'c'"):
        logits(tiny_llama, inputs("llama"))
    assert not engine.active


def test_weights_that_learned_to_be_no_numbers_are_named(tiny_llama: nn.Module, make_adapters: Make) -> None:
    values_BTLE = torch.ones(1, 1, 1, 3, requires_grad=True)
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    with engine.activate(MixtureWeights(values_BTLE, ("a", "b", "c"))):
        logits(tiny_llama, inputs("llama"))
        values_BTLE.data[..., 1] = float("nan")
        with pytest.raises(WeightingError, match="not finite, first for expert 'b'"):
            logits(tiny_llama, inputs("llama"))


def test_large_weights_are_numbers(tiny_llama: nn.Module, make_adapters: Make) -> None:
    """Also where their sum is none."""

    class Large:
        def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
            return torch.full((1, 1, 3), 3e38)

    with Composer(tiny_llama, make_adapters(tiny_llama, "llama")).activate(Large()):
        logits(tiny_llama, inputs("llama"))


def test_a_router_for_another_pool_is_refused(tiny_llama: nn.Module, make_adapters: Make) -> None:
    class Reordered:
        experts = ("b", "a", "c")

        def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
            return torch.ones(1, 1, 3)

    with pytest.raises(WeightingError, match="Reordered"):
        Composer(tiny_llama, make_adapters(tiny_llama, "llama")).activate(Reordered())


def test_making_and_closing_a_composer_changes_nothing(tiny_llama: nn.Module, make_adapters: Make) -> None:
    before = {name: (id(p), p.data_ptr(), p._version) for name, p in tiny_llama.named_parameters()}
    kept = dict(vars(tiny_llama))
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    engine.close()
    engine.close()
    assert {name: (id(p), p.data_ptr(), p._version) for name, p in tiny_llama.named_parameters()} == before
    assert vars(tiny_llama) == kept


def test_a_closed_composer_says_so(tiny_llama: nn.Module, make_adapters: Make) -> None:
    adapters = make_adapters(tiny_llama, "llama")
    engine = Composer(tiny_llama, adapters, tokenizer=object())
    engine.close()
    for call in (
        lambda: engine.activate({"a": 1.0}),
        lambda: engine.swap(adapters),
        lambda: engine.generate(["5"]),
        lambda: engine.stream(["5"]),
        lambda: engine.fused({"a": 1.0}).__enter__(),
    ):
        with pytest.raises(CompositionError, match="closed"):
            call()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_composer_is_refused_with_the_way_out(
    copied: Callable[[Any], Any], tiny_llama: nn.Module, make_adapters: Make
) -> None:
    with pytest.raises(CompositionError, match="copy the model, and make a Composer for it"):
        copied(Composer(tiny_llama, make_adapters(tiny_llama, "llama")))


def test_swap_takes_another_pool(tiny_llama: nn.Module, make_adapters: Make) -> None:
    a, b, c = make_adapters(tiny_llama, "llama")
    with Composer(tiny_llama, [c]).activate({"c": 1.0}):
        expected = logits(tiny_llama, inputs("llama"))
    engine = Composer(tiny_llama, [a, b])
    with engine.activate({"a": 1.0}):
        logits(tiny_llama, inputs("llama"))
    engine.swap([c])
    assert engine.pool.names == ("c",)
    with engine.activate({"c": 1.0}):
        assert torch.equal(logits(tiny_llama, inputs("llama")), expected)


def test_a_refused_swap_keeps_the_old_pool(engine: Composer) -> None:
    with pytest.raises(LayerMismatch):
        engine.swap([Adapter("odd", "tiny", {"nowhere": Factors(torch.ones(1, 4), torch.ones(4, 1))})])
    assert engine.pool.names == ("a", "b", "c")


@pytest.mark.parametrize(("use", "said"), [(Composer.activate, "activation is open"), (Composer.fused, "fused")])
def test_what_is_forbidden_while_a_mixture_is_active_or_fused(use, said, tiny_llama: nn.Module, make_adapters: Make) -> None:
    adapters = make_adapters(tiny_llama, "llama")
    engine = Composer(tiny_llama, adapters)
    forbidden = [lambda: engine.swap(adapters), engine.close, lambda: engine.fused({"a": 1.0}).__enter__()]
    # activations may be inside each other
    forbidden += [lambda: engine.activate({"a": 1.0})] if use is Composer.fused else []
    with use(engine, {"a": 1.0}):
        assert engine.active
        for call in forbidden:
            with pytest.raises(AlreadyActive, match=said):
                call()
    assert not engine.active


@pytest.mark.parametrize("first", ["activate", "fused"])
@pytest.mark.parametrize("second", ["activate", "fused"])
def test_two_composers_on_one_model_take_turns(first: str, second: str, tiny_llama: nn.Module, make_adapter: Make) -> None:
    engines = [Composer(tiny_llama, [make_adapter(tiny_llama, "a", targets=(target,))]) for target in ("q_proj", "v_proj")]
    base = logits(tiny_llama, inputs("llama"))
    with getattr(engines[0], first)({"a": 1.0}):
        with pytest.raises(AlreadyActive, match="another Composer"), getattr(engines[1], second)({"a": 1.0}):
            pass
        assert not engines[1].active
    with getattr(engines[1], second)({"a": 1.0}):
        pass
    assert torch.equal(logits(tiny_llama, inputs("llama")), base)


def test_a_composer_on_a_part_of_a_busy_model_waits_too(tiny_llama: nn.Module, make_adapter: Make) -> None:
    whole = Composer(tiny_llama, [make_adapter(tiny_llama, "a")])
    part = Composer(tiny_llama.model, [make_adapter(tiny_llama.model, "a")])
    with whole.activate({"a": 1.0}), pytest.raises(AlreadyActive):
        part.activate({"a": 1.0})


def test_a_pool_is_taken_as_it_is(tiny_llama: nn.Module, make_adapters: Make) -> None:
    pool = ExpertPool(make_adapters(tiny_llama, "llama"))
    engine = Composer(tiny_llama, pool)
    assert engine.pool is pool
    assert engine.model is tiny_llama
