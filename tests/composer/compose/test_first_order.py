"""The slope of the loss in every expert's weight: against autograd through live weights, and dense differences."""

from __future__ import annotations

import math

import pytest
import torch

from loraweave.composer.compose.rerank import first_order, update_norm
from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import IGNORED, batch, encode, mean_losses, target_logits
from loraweave.errors import AlreadyActive, CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors, Task

TASK = Task([("a dog", "one"), ("two birds sing", "two"), ("x", "a long answer 12"), ("cats", "b")])
KINDS = ("llama", "gpt2", "t5")


def adapters_of_all_parts(make_model, make_adapters, kind):
    """Plain ones, and one that also has gains and biases."""
    model = make_model(kind, dtype=torch.float64)
    plain = make_adapters(model, kind)
    generator = torch.Generator().manual_seed(9)
    parts = {
        layer: Factors(
            factors.a_RI,
            factors.b_OR,
            gain_O=torch.randn(len(factors.b_OR), generator=generator) * 0.3,
            bias_O=torch.randn(len(factors.b_OR), generator=generator) * 0.3,
        )
        for layer, factors in plain[2].layers.items()
    }
    return model, [*plain, Adapter("with gain and bias", "tiny", parts)]


def encoded(model, tokenizer, task):
    rows = encode(model, tokenizer, [task.prompt(text) for text, _ in task.examples], [t for _, t in task.examples])
    return batch(model, tokenizer, rows)


def losses_of(model, tokenizer, task):
    return mean_losses(model, encoded(model, tokenizer, task)).mean()


def exact_loss(model, tokenizer, task):
    """The loss with no step of it in fp32, so that small differences keep their digits."""
    prepared = encoded(model, tokenizer, task)
    log_p_BKV = target_logits(model, prepared).double().log_softmax(dim=2)
    losses = []
    for row_KV, target_K in zip(log_p_BKV, prepared.targets_BK, strict=True):
        real_K = target_K != IGNORED
        losses.append(-row_KV[real_K, target_K[real_K]].mean())
    return float(torch.stack(losses).mean())


def assert_slopes_are_those_of_autograd(engine, tokenizer, at=None, **options):
    """Through the weights of the live mixture, which are 0 unless `at` has them."""
    names = engine.pool.names
    weights = torch.tensor([(at or {}).get(name, 0.0) for name in names], dtype=torch.float64).requires_grad_()
    with engine.activate(MixtureWeights(weights.view(1, 1, 1, -1), names)):
        loss = losses_of(engine.model, tokenizer, TASK)
        loss.backward()
    found = first_order(engine, tokenizer, TASK, mixture=at, **options)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5 if at else 1e-6)
    assert list(found.slopes) == list(names)
    slope_E = torch.tensor(list(found.slopes.values()), dtype=torch.float64)
    torch.testing.assert_close(slope_E, weights.grad, rtol=1e-4 if at else 1e-5, atol=1e-5 if at else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 3}, {"at": {"a": 0.3, "b": -0.2, "with gain and bias": 0.1}}], ids=str
)
def test_slopes_are_those_of_autograd(make_model, make_adapters, tokenizer, kind, options):
    model, adapters = adapters_of_all_parts(make_model, make_adapters, kind)
    assert_slopes_are_those_of_autograd(Composer(model, adapters), tokenizer, **options)


def test_slopes_of_an_embedding_are_those_of_autograd(make_model, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    a_RI, b_OR, gain_O = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((2, 61), (16, 2), (16,)))
    factors = Factors(a_RI, b_OR, gain_O=gain_O, kind="embedding")
    engine = Composer(model, [Adapter("a", "tiny", {"model.embed_tokens": factors})])
    assert_slopes_are_those_of_autograd(engine, tokenizer, batch_size=3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_slopes_are_the_difference_quotients_of_the_dense_model(
    make_model, make_adapters, with_dense_update, tokenizer, kind
):
    model = make_model(kind, dtype=torch.float64)
    adapters = make_adapters(model, kind)
    slopes = first_order(Composer(model, adapters), tokenizer, TASK).slopes
    for adapter in adapters:
        with torch.no_grad():
            up, down = (
                exact_loss(with_dense_update(kind, [adapter], [step], dtype=torch.float64), tokenizer, TASK)
                for step in (1e-4, -1e-4)
            )
        # llama normalises in fp32 whatever the model's dtype
        assert slopes[adapter.name] == pytest.approx((up - down) / 2e-4, rel=3e-3, abs=1e-3)


def test_a_trained_magnitude_counts_as_the_base_at_hand_resolves_it(make_model, make_adapter, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    plain = make_adapter(model, "dora")
    layers = {name: Factors(f.a_RI, f.b_OR, magnitude_O=torch.rand(len(f.b_OR)) + 0.5) for name, f in plain.layers.items()}
    engine = Composer(model, [Adapter("dora", "tiny", layers)])
    assert_slopes_are_those_of_autograd(engine, tokenizer)


def test_padding_does_not_count(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    engine = Composer(model, make_adapters(model, "llama"))
    together = first_order(engine, tokenizer, TASK, batch_size=4)
    alone = [first_order(engine, tokenizer, Task([example])) for example in TASK.examples]
    for name, slope in together.slopes.items():
        assert slope == pytest.approx(sum(one.slopes[name] for one in alone) / len(alone), rel=1e-6)


def test_the_order_of_the_pool_does_not_matter(make_model, make_adapters, tokenizer):
    model = make_model("gpt2", dtype=torch.float64)
    adapters = make_adapters(model, "gpt2")
    first = first_order(Composer(model, adapters), tokenizer, TASK).slopes
    second = first_order(Composer(model, adapters[::-1]), tokenizer, TASK).slopes
    assert first == {name: pytest.approx(slope, rel=1e-9) for name, slope in second.items()}


def test_a_layer_that_runs_twice_has_the_slope_of_both_calls(make_model, make_adapter, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    engine = Composer(model, [make_adapter(model, "a", targets=("down_proj",))])
    assert_slopes_are_those_of_autograd(engine, tokenizer)


def test_bf16_slopes_are_near_those_of_float64(make_model, make_adapters, tokenizer):
    exact, near = (
        first_order(Composer(model, make_adapters(model, "llama")), tokenizer, TASK).slopes
        for model in (make_model("llama", dtype=torch.float64), make_model("llama", dtype=torch.bfloat16))
    )
    size = max(abs(slope) for slope in exact.values())
    assert all(abs(near[name] - slope) < 0.1 * size for name, slope in exact.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(make_model, make_adapters, tokenizer, kind):
    model = make_model(kind)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        first_order(Composer(model, make_adapters(model, kind)), tokenizer, TASK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_an_error_in_the_backward_pass_leaves_the_model_as_it_was(tiny_llama, make_adapter, tokenizer, monkeypatch):
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, "a")])
    monkeypatch.setattr("loraweave.composer.compose.rerank._Slopes.receive", lambda self, gradient, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first_order(engine, tokenizer, TASK)
    assert not engine.active
    assert all(not module._forward_hooks for module in tiny_llama.modules())
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_another_composer_that_is_active_is_no_base_to_measure_on(tiny_llama, make_adapter, tokenizer):
    adapter = make_adapter(tiny_llama, "a")
    with Composer(tiny_llama, [adapter]).activate({"a": 1.0}), pytest.raises(AlreadyActive):
        first_order(Composer(tiny_llama, [adapter]), tokenizer, TASK)


def test_a_loss_that_is_not_finite_is_named(tiny_llama, make_adapter, tokenizer):
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, "a")])
    with torch.no_grad():
        tiny_llama.model.norm.weight.fill_(math.nan)
    with pytest.raises(CompositionError, match="loss on the examples is nan"):
        first_order(engine, tokenizer, TASK)


def test_the_norm_of_an_update_is_that_of_its_dense_form(make_model, make_adapters):
    model, adapters = adapters_of_all_parts(make_model, make_adapters, "gpt2")
    engine = Composer(model, adapters)
    for adapter in adapters:
        square = 0.0
        for layer, factors in adapter.layers.items():
            dense_OI = factors.b_OR.double() @ factors.a_RI.double()
            if factors.gain_O is not None:
                dense_OI += factors.gain_O.double()[:, None] * model.get_submodule(layer).weight.detach().T
                square += float(factors.bias_O.double().square().sum())
            square += float(dense_OI.square().sum())
        assert update_norm(engine, adapter.name) == pytest.approx(square**0.5, rel=1e-6)
