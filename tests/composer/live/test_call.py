"""Routers that look at the whole input of a call before its first layer."""

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.composer.live.call import in_own_precision
from loraweave.errors import CompositionError, ScopeError
from loraweave.routers.combined import under
from loraweave.routers.tokens._saved import router
from loraweave.routers.weights import MixtureWeights

IDS_BT = torch.tensor([[5, 9, 11, 2], [7, 8, 3, 30]])


class ByLastHidden:
    """The weight of each token is the sigmoid of the first feature of the base's own last hidden state."""

    def __init__(self, experts, scale=None):
        self.experts = experts
        self.scale = torch.ones(()) if scale is None else scale
        self.seen = []

    def begin(self, model, arguments):
        self.seen.append(arguments)
        with torch.no_grad():
            hidden_BTD = model.model(arguments["input_ids"]).last_hidden_state
        w_BT = (self.scale * hidden_BTD[..., 0]).sigmoid()
        return MixtureWeights(w_BT[:, :, None, None].expand(-1, -1, 1, len(self.experts)), self.experts)

    def weights(self, x_BTI, layer):
        raise AssertionError("the router of the call is asked")


@pytest.fixture
def model(make_model):
    return make_model("llama", dtype=torch.float64)


@pytest.fixture
def adapters(model, make_adapters):
    return make_adapters(model, "llama")


def test_it_sees_the_base_and_every_layer_gets_the_weights_of_the_call(model, adapters):
    engine, names = Composer(model, adapters), tuple(a.name for a in adapters)
    router = ByLastHidden(names)
    with torch.no_grad():
        w_BT = model.model(IDS_BT).last_hidden_state[..., 0].sigmoid()
        known = MixtureWeights(w_BT[:, :, None, None].expand(-1, -1, 1, len(names)), names)
        with engine.activate(known):
            expected = model(IDS_BT).logits
        with engine.activate(router):
            assert torch.allclose(model(IDS_BT).logits, expected, atol=1e-12)
            assert torch.allclose(model(input_ids=IDS_BT[:1]).logits, expected[:1], atol=1e-12)
    assert [arguments["input_ids"].shape for arguments in router.seen] == [(2, 4), (1, 4)]


class Comparing(ByLastHidden):
    """Looks at what the model answers under two mixtures, and gives all tokens the second."""

    def begin(self, model, arguments):
        for mixture in ({self.experts[0]: 0.5}, {self.experts[1]: -1.0, self.experts[0]: 0.25}):
            with under(mixture):
                self.seen.append(model(arguments["input_ids"]).logits)
        return MixtureWeights.of(mixture, self.experts)


def test_a_router_sees_what_the_model_answers_under_mixtures_of_its_experts(model, adapters):
    engine, names = Composer(model, adapters), tuple(a.name for a in adapters)
    router, expected = Comparing(names), []
    with torch.no_grad():
        for mixture in ({names[0]: 0.5}, {names[1]: -1.0, names[0]: 0.25}):
            with engine.activate(mixture):
                expected.append(model(IDS_BT).logits)
        with engine.activate(router):
            answer = model(IDS_BT).logits
    for found, wanted in zip([*router.seen, answer], [*expected, expected[1]], strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)
    with pytest.raises(ScopeError, match="only inside a call that a Composer sees"), under({names[0]: 1.0}):
        pass


def test_a_part_of_the_model_alone_has_no_weights(model, adapters):
    router = ByLastHidden(tuple(a.name for a in adapters))
    with torch.no_grad(), Composer(model, adapters).activate(router):
        model(IDS_BT)
        with pytest.raises(ScopeError, match="looks at the input of the whole model first"):
            model.model(IDS_BT)


@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradient(model, adapters):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        with Composer(model, adapters).activate(ByLastHidden(tuple(a.name for a in adapters), scale)):
            model(IDS_BT, labels=IDS_BT).loss.backward()
        found.append(scale.grad)
    assert torch.allclose(*found, atol=1e-12)
    assert bool(found[0].any())


@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning")
def test_layers_that_run_again_after_two_calls_are_refused_and_after_each_are_not(model, adapters):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    router = ByLastHidden(tuple(a.name for a in adapters), scale)
    with Composer(model, adapters).activate(router):
        for _ in range(2):
            model(IDS_BT, labels=IDS_BT).loss.backward()
        once = model(IDS_BT, labels=IDS_BT).loss
        twice = once + model(IDS_BT.flip(1), labels=IDS_BT).loss
        with pytest.raises(CompositionError, match=r"again after 2 calls .* call backward\(\) after each"):
            twice.backward()


def test_nothing_of_a_call_is_left_after_an_error_in_it(model, adapters):
    router = ByLastHidden(tuple(a.name for a in adapters))
    with torch.no_grad(), Composer(model, adapters).activate(router):
        with pytest.raises(IndexError):
            model(torch.tensor([[5, 999]]))
        with torch.no_grad():
            assert torch.isfinite(model(IDS_BT).logits).all()


class OneTensor:
    """Every layer gets the same tensor; it is twice as much in each further layer, unless it says that it stays."""

    def __init__(self, w_BTE, stays):
        self.w_BTE, self.stays = w_BTE, stays

    def begin(self, model, arguments):
        return self.OfCall(self.w_BTE.clone(), self.stays)

    def weights(self, x_BTI, layer):
        raise AssertionError("the router of the call is asked")

    class OfCall:
        def __init__(self, w_BTE, stays):
            self.w_BTE, self.shares_weights = w_BTE, stays

        def weights(self, x_BTI, layer):
            return self.w_BTE if self.shares_weights else self.w_BTE.mul_(2)


@pytest.mark.parametrize("stays", [True, False], ids=["it stays", "it changes"])
def test_a_tensor_for_all_layers_counts_as_it_is_in_each(stays, model, adapters):
    engine, names = Composer(model, adapters), tuple(a.name for a in adapters)
    router = OneTensor(torch.rand(2, 4, len(names), generator=torch.Generator().manual_seed(0), dtype=torch.float64), stays)
    with torch.no_grad(), engine.activate(router):
        for scale in (1.0, 3.0):
            router.w_BTE.mul_(scale)
            with engine.record() as trace:
                found = model(IDS_BT).logits
            layers = list(trace.weights)
            by_layer = [router.w_BTE * (1 if stays else 2 ** (at + 1)) for at in range(len(layers))]
            with engine.activate(MixtureWeights(torch.stack(by_layer, dim=2), names, tuple(layers))):
                assert torch.allclose(model(IDS_BT).logits, found, atol=1e-12)


def test_layers_share_what_is_made_of_the_weights_of_xlora(model, adapters):
    of_call = in_own_precision(router("xlora", adapters[:1])).begin(model, {"input_ids": IDS_BT})
    first, last = (of_call.weights(torch.zeros(2, 4, 1), list(adapters[0].layers)[at]) for at in (0, -1))
    assert of_call.shares_weights
    assert first is last
