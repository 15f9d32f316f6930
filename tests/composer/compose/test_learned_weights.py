"""The gradient searches of routers/ on the loss of a model: the published updates, run on weights written out densely."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.model.batches import batch, encode, token_losses
from loraweave.errors import SearchFailed
from loraweave.routers.searches.adamerging import Adamerging
from loraweave.routers.searches.first_order import FirstOrder
from loraweave.routers.searches.gradient import Gradient

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


class Losses(torch.nn.Module):
    """The loss of every token of some rows' targets, as a module, so that it can be called with other weights."""

    def __init__(self, model, rows):
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self):
        return token_losses(self.model, self.rows)


@pytest.fixture
def written_out(make_model, adapters, tokenizer):
    """written_out(prompts, targets)(w_LE, layers): losses of W + sum over e of w_le B_e A_e, for autograd."""
    model = make_model("gpt2", dtype=torch.float64)

    def of_rows(prompts, targets):
        losses = Losses(model, batch(model, tokenizer, encode(model, tokenizer, prompts, targets)))

        def loss_BK(w_LE, layers):
            changed = {}
            for w_E, layer in zip(w_LE, layers, strict=True):
                weight_IO = model.get_submodule(layer).weight.detach()
                for w, adapter in zip(w_E, adapters, strict=True):
                    if layer in adapter.layers:
                        factors = adapter.layers[layer]
                        weight_IO = weight_IO + w * (factors.b_OR.double() @ factors.a_RI.double()).T
                changed[f"model.{layer}.weight"] = weight_IO
            return functional_call(losses, changed)

        return loss_BK

    return of_rows


FORMULAS = {"softmax": lambda p_LE: torch.softmax(p_LE, dim=1), "free": lambda p_LE: p_LE + 1 / 3}


@pytest.mark.parametrize("form", FORMULAS)
@pytest.mark.parametrize("by_layer", [True, False])
def test_learning_goes_as_in_a_model_whose_weights_are_written_out(form, by_layer, objective, written_out):
    layers = list(objective.engine.target_layers)
    result = Gradient(NAMES, budget=12, form=form, layers=layers, by_layer=by_layer, lr=0.1, schedule="constant").solve(
        objective
    )
    dense = written_out([TASK.prompt(text) for text, _ in TASK.examples], [target for _, target in TASK.examples])
    p_LE = torch.zeros(len(layers) if by_layer else 1, 3, dtype=torch.float64, requires_grad=True)
    adam, losses = torch.optim.Adam([p_LE], lr=0.1), []
    for _ in range(6):
        adam.zero_grad()
        loss_BK = dense(FORMULAS[form](p_LE).expand(len(layers), 3), layers)
        loss = (loss_BK.sum(dim=1) / (loss_BK != 0).sum(dim=1)).mean()
        loss.backward()
        losses.append(loss.item())
        adam.step()
    # the weights that a search asks for are in fp32
    assert result.losses == pytest.approx(losses, rel=1e-5)


def test_learned_weights_by_layer_have_a_lower_loss_than_every_adapter_alone(objective):
    singles = objective([lw.MixtureWeights.of({name: 1.0}, NAMES) for name in NAMES])
    layers = list(objective.engine.target_layers)
    for solver in (
        Gradient(NAMES, layers=layers, form="softmax"),
        Gradient(NAMES, layers=layers, form="free"),
        Gradient(NAMES, form="softmax_bias"),
        FirstOrder(NAMES),
    ):
        assert solver.solve(objective).loss < min(singles)


def test_adamerging_follows_the_entropy_over_labels_of_a_model_whose_weights_are_written_out(
    model, adapters, tokenizer, written_out
):
    labels, inputs = ["ab", "c", "DD"], ["a", "cc", "e f", "b"]
    task = lw.Task([("a", "ab"), ("cc", "c")], labels=labels)
    entropy = ExampleLoss(lw.Composer(model, adapters), tokenizer, task, kind=Adamerging.loss, inputs=inputs, l1=0.0)
    layers = list(entropy.engine.target_layers)
    result = Adamerging(NAMES, budget=8, layers=layers, lr=0.1).solve(entropy)
    prompts = [task.prompt(text) for text in inputs for _ in labels]
    dense = written_out(prompts, labels * len(inputs))
    w_LE = torch.full((len(layers), 3), 0.3, dtype=torch.float64, requires_grad=True)
    adam, losses = torch.optim.Adam([w_LE], lr=0.1), []
    for _ in range(4):
        adam.zero_grad()
        logs_NR = (-dense(w_LE, layers).sum(dim=1)).view(len(inputs), len(labels)).log_softmax(dim=1)
        loss = -(logs_NR.exp() * logs_NR).sum(dim=1).mean()
        loss.backward()
        losses.append(loss.item())
        adam.step()
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert result.loss < result.losses[0]


def test_a_layer_that_the_pool_does_not_have_fails_the_search_and_is_named_by_the_objective(objective):
    with pytest.raises(SearchFailed, match="none of 1 candidates"):
        Gradient(NAMES, layers=["transformer.h.7.mlp.c_fc"]).solve(objective)
    assert "transformer.h.7.mlp.c_fc" in str(objective.failures.first)
