"""What activate() takes: one batch of rows with mixtures of every kind."""

import pytest
import torch

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


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def test_rows_of_every_kind_are_in_one_batch_what_each_is_alone(tiny_llama, make_adapters):
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    tokens = MixtureWeights(torch.linspace(-1, 1, 18).view(1, 6, 1, 3), ("a", "b", "c"))
    by_layer = MixtureWeights(torch.tensor([[[[0.5, 0.0], [0.0, 2.0]]]]), ("c", "a"), (LAYERS[0], LAYERS[1]))
    rows = [{"a": 0.7, "c": -0.2}, Sharpest(), None, tokens, by_layer]
    with engine.activate(rows):
        together = logits(tiny_llama, IDS)
    for number, row in enumerate(rows):
        with engine.activate({} if row is None else row):
            alone = logits(tiny_llama, IDS[number : number + 1])
        assert torch.allclose(together[number : number + 1], alone, rtol=1e-5, atol=1e-5)
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


def test_a_row_that_is_no_row_is_named(tiny_llama, make_adapters):
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
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
def test_a_layer_that_is_named_twice_is_refused(learning, tiny_llama, make_adapters):
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    values = torch.tensor([[[[1.0], [2.0]]]], requires_grad=learning)
    with pytest.raises(WeightingError, match=f"names a layer twice: '{LAYERS[0]}', '{LAYERS[0]}'"):
        engine.activate(MixtureWeights(values, ("a",), (LAYERS[0], LAYERS[0])))
