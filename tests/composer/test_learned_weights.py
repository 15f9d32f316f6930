"""The gradient searches of routers/ on the loss of a model: the published updates, run on weights written out densely."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import loraweave as lw
from loraweave.composer.batches import batch, encode, mean_losses
from loraweave.composer.example_loss import ExampleLoss
from loraweave.errors import SearchFailed
from loraweave.routers.first_order import FirstOrder
from loraweave.routers.gradient import Gradient

TASK = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")], instruction="swap")
NAMES = ("a", "b", "c")


@pytest.fixture
def model(make_model):
    return make_model("gpt2", dtype=torch.float64)


@pytest.fixture
def adapters(model, make_adapters):
    return make_adapters(model, "gpt2")


@pytest.fixture
def objective(model, adapters, tokenizer):
    return ExampleLoss(lw.Composer(model, adapters), tokenizer, TASK, l1=0.0)


@pytest.fixture
def dense_loss(make_model, adapters, tokenizer):
    """dense_loss(w_LE, layers): the loss with W + sum over e of w_le B_e A_e in each layer, for autograd."""
    model = make_model("gpt2", dtype=torch.float64)
    rows = encode(model, tokenizer, [TASK.prompt(text) for text, _ in TASK.examples], [t for _, t in TASK.examples])
    encoded = batch(model, tokenizer, rows)

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self):
            return mean_losses(self.inner, encoded).mean()

    called = Called()
    parameters = dict(called.named_parameters())

    def loss(w_LE, layers):
        changed = {}
        for w_E, layer in zip(w_LE, layers, strict=True):
            weight_IO = parameters[f"inner.{layer}.weight"].detach()
            for w, adapter in zip(w_E, adapters, strict=True):
                if layer in adapter.layers:
                    factors = adapter.layers[layer]
                    weight_IO = weight_IO + w * (factors.b_OR.double() @ factors.a_RI.double()).T
            changed[f"inner.{layer}.weight"] = weight_IO
        return functional_call(called, changed)

    return loss


FORMULAS = {"softmax": lambda p_LE: torch.softmax(p_LE, dim=1), "free": lambda p_LE: p_LE + 1 / 3}


@pytest.mark.parametrize("form", FORMULAS)
@pytest.mark.parametrize("by_layer", [True, False])
def test_learning_goes_as_in_a_model_whose_weights_are_written_out(form, by_layer, objective, dense_loss):
    layers = list(objective.engine.target_layers)
    result = Gradient(NAMES, budget=12, form=form, layers=layers, by_layer=by_layer, lr=0.1).solve(objective)
    p_LE = torch.zeros(len(layers) if by_layer else 1, 3, dtype=torch.float64, requires_grad=True)
    adam, losses = torch.optim.Adam([p_LE], lr=0.1), []
    for _ in range(6):
        adam.zero_grad()
        loss = dense_loss(FORMULAS[form](p_LE).expand(len(layers), 3), layers)
        loss.backward()
        losses.append(loss.item())
        adam.step()
    # the weights that a search asks for are in fp32
    assert result.losses == pytest.approx(losses, rel=1e-5)


def test_learned_weights_by_layer_have_a_lower_loss_than_every_adapter_alone(objective):
    singles = objective([lw.MixtureWeights.of({name: 1.0}, NAMES) for name in NAMES])
    layers = list(objective.engine.target_layers)
    for solver in (
        Gradient(NAMES, layers=layers),
        Gradient(NAMES, layers=layers, form="free"),
        Gradient(NAMES, form="softmax_bias"),
        FirstOrder(NAMES),
    ):
        assert solver.solve(objective).loss < min(singles)


def test_a_layer_that_the_pool_does_not_have_fails_the_search_and_is_named_by_the_objective(objective):
    with pytest.raises(SearchFailed, match="none of 1 candidates"):
        Gradient(NAMES, layers=["transformer.h.7.mlp.c_fc"]).solve(objective)
    assert "transformer.h.7.mlp.c_fc" in str(objective.failures.first)
