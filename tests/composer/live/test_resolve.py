"""What activate() takes: rows of every kind in one batch, and a word where their licenses exclude each other."""

import dataclasses
import warnings

import pytest
import torch
from live_models import logits
from rounding import assert_near, num_terms

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.live.resolve import resolve
from loraweave.errors import ScopeError, WeightingError
from loraweave.routers.weights import MixtureWeights

IDS = torch.randint(3, 60, (5, 6), generator=torch.Generator().manual_seed(5))


class Sharpest:
    """A token router: the sign of one feature chooses between the first two experts."""

    def weights(self, x_BTI, layer):
        chosen_BT = x_BTI[..., 0] > 0
        return torch.stack([chosen_BT, ~chosen_BT, torch.zeros_like(chosen_BT)], dim=-1).float()


def test_rows_of_every_kind_are_in_one_batch_what_each_is_alone(engine, tiny_llama):
    tokens = MixtureWeights(torch.linspace(-1, 1, 18).view(1, 6, 1, 3), ("a", "b", "c"))
    by_layer = MixtureWeights(torch.tensor([[[[0.5, 0.0], [0.0, 2.0]]]]), ("c", "a"), (LAYERS[0], LAYERS[1]))
    rows = [{"a": 0.7, "c": -0.2}, Sharpest(), None, tokens, by_layer]
    with engine.activate(rows):
        together = logits(tiny_llama, IDS)
    for number, row in enumerate(rows):
        with engine.activate({} if row is None else row):
            alone = logits(tiny_llama, IDS[number : number + 1])
        assert_near(together[number : number + 1], alone, num_terms(tiny_llama))
    assert torch.equal(together[2], logits(tiny_llama, IDS)[2])


LAYERS = ("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj")


def test_only_the_experts_that_are_named_are_weighed(tiny_llama, make_adapter):
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, f"expert {n}", seed=n) for n in range(30)])
    found = resolve([{"expert 20": 1.0}, {"expert 3": 0.5, "expert 20": 0.1}, None], engine.pool)
    assert isinstance(found, MixtureWeights)
    assert found.experts == ("expert 3", "expert 20")
    assert found.values_BTLE[:, 0, 0].tolist() == [[0.0, 1.0], [0.5, pytest.approx(0.1)], [0.0, 0.0]]


@pytest.mark.parametrize("by_row", [False, True], ids=["for all", "in a list"])
@pytest.mark.parametrize("names", ["ac", "ca"], ids="".join)
def test_weights_that_learn_are_followed_from_step_to_step(names, by_row, make_model, make_adapters):
    model = make_model("llama", dtype=torch.float64).requires_grad_(False)
    engine = Composer(model, make_adapters(model, "llama"))
    start = torch.tensor([0.5, -0.25])

    def losses_of(activate, *, once):
        values = start.clone().view(1, 1, 1, 2).requires_grad_()
        optimizer, losses = torch.optim.SGD([values], lr=0.01), []
        for _ in range(1 if once else 3):
            with activate(MixtureWeights(values, tuple(names))):
                for _ in range(3 if once else 1):
                    optimizer.zero_grad()
                    loss = model(input_ids=IDS, labels=IDS).loss
                    loss.backward()
                    optimizer.step()
                    losses.append(float(loss.detach()))
        return losses

    def activate(weights):
        return engine.activate([weights] * 5 if by_row else weights)

    losses = losses_of(activate, once=True)
    assert len(set(losses)) == 3
    assert losses == losses_of(activate, once=False)


def test_a_row_that_is_no_row_is_named(engine):
    two = MixtureWeights(torch.ones(2, 1, 1, 3), ("a", "b", "c"))
    with pytest.raises(ScopeError, match=r"row 1.*for 2 rows"):
        engine.activate([None, two])
    other = Sharpest()
    other.experts = ("a", "b")
    with pytest.raises(WeightingError, match=r"row 0.*Sharpest"):
        engine.activate([other, None])
    with pytest.raises(WeightingError, match="3"):
        engine.activate([None, 3])
    assert not engine.active


@pytest.mark.parametrize("learning", [False, True])
def test_a_layer_that_is_named_twice_is_refused(learning, engine):
    values = torch.tensor([[[[1.0], [2.0]]]], requires_grad=learning)
    with pytest.raises(WeightingError, match=f"names a layer twice: '{LAYERS[0]}', '{LAYERS[0]}'"):
        engine.activate(MixtureWeights(values, ("a",), (LAYERS[0], LAYERS[0])))


LICENSES = ("gpl-3.0", "cc-by-nc-4.0", "mit")


class Even:
    """A router: every expert alike."""

    def __init__(self, num_experts):
        self.num_experts = num_experts

    def weights(self, x_BTI, layer):
        return torch.full((1, 1, self.num_experts), 1 / self.num_experts)


@pytest.fixture
def licensed(tiny_llama, make_adapters):
    pairs = zip(make_adapters(tiny_llama, "llama"), LICENSES, strict=True)
    return lw.Composer(tiny_llama, [dataclasses.replace(adapter, card={"license": license}) for adapter, license in pairs])


def warned(licensed, mixture):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        licensed.activate(mixture).close()
    return [str(each.message) for each in seen]


@pytest.mark.parametrize(
    "mixture",
    [
        {"a": 1.0},
        {"a": 1.0, "c": 1.0},
        {"a": 1.0, "b": 0.0},
        [{"a": 1.0}, {"b": 1.0}, None],
        [{"a": 1.0, "c": 0.5}, {"b": 1.0, "c": 0.5}],
        lw.MixtureWeights.of({"a": 1.0, "b": 0.0}, ["a", "b"]),
    ],
)
def test_what_fits_together_in_each_row_gives_no_word(licensed, mixture):
    assert warned(licensed, mixture) == []


@pytest.mark.parametrize(
    "mixture",
    [
        {"a": 1.0, "b": 1.0},
        [{"c": 1.0}, {"a": 0.1, "b": 0.5}],
        lw.MixtureWeights.of([{"a": 1.0, "b": 1.0}], ["a", "b"]),
        [lw.MixtureWeights.of({"a": 1.0, "b": 1.0}, ["a", "b"]), {"c": 1.0}],
        Even(3),
        [Even(3), None],
    ],
)
def test_a_mixture_of_licenses_that_exclude_each_other_warns(licensed, mixture):
    [said] = warned(licensed, mixture)
    assert "'a' is under GPL-3.0-only" in said
    assert "'b' under CC-BY-NC-4.0" in said


def test_it_is_said_once_in_a_program_and_the_mixture_works(licensed):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            licensed.activate({"a": 1.0, "b": 1.0}).close()
        with licensed.fused({"a": 1.0, "b": 1.0}):
            pass
    assert len(seen) == 1


def test_fusing_and_switching_warn_too(licensed):
    with pytest.warns(UserWarning, match="GPL-3.0-only"), licensed.fused({"a": 1.0, "b": 1.0}):
        pass
    with licensed.fused({"a": 1.0, "c": 1.0}) as fused, pytest.warns(UserWarning, match="GPL-3.0-only"):
        fused.switch({"a": 1.0, "b": 1.0})


def test_an_expert_alone_is_no_work_derived_from_it_and_a_mixture_is(tiny_llama, make_adapters):
    adapters = [dataclasses.replace(each, card={"license": "CC-BY-ND-4.0"}) for each in make_adapters(tiny_llama, "llama")]
    engine = lw.Composer(tiny_llama, adapters)
    assert warned(engine, {"a": 0.5}) == []
    assert warned(engine, [{"a": 1.0}, {"b": 1.0}]) == []
    [said] = warned(engine, {"a": 0.5, "b": 0.5})
    assert "'a' is under CC-BY-ND-4.0, which permits no work derived from it" in said
