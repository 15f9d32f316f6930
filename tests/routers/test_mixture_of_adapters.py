"""Mixture-of-LoRAs' routers of layers, taught by the experts of rows."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.errors import InvalidTask, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.learned_router import Step
from loraweave.routers.routing.make import router

DATA = {"a": [("abc abc", "cba"), ("ba ba", "ab")], "b": [("1 2 3", "1"), ("22 1", "2")], "c": [("X Y", "Z"), ("YY Z", "X")]}


@pytest.fixture
def model(make_model):
    return make_model("llama")


@pytest.fixture
def pool(model, make_adapters):
    return ExpertPool(make_adapters(model, "llama"))


def made_of(pool, **options):
    torch.manual_seed(2)
    return router("mixture_of_adapters", pool, **options)


def test_the_loss_is_eta_times_the_sum_over_layers_of_the_cross_entropy_with_the_rows_expert(pool):
    made = made_of(pool, eta=0.3)
    mask_BT = torch.tensor([[0, 1, 1], [1, 1, 1]])
    made.step = Step(mask_BT, torch.tensor([2, 0]))
    x_BTI = torch.randn(2, 3, 16)
    expected = 0.0
    for layer, present, rows in (("q_proj", [0, 2], [0, 1]), ("v_proj", [0, 1, 2], [0, 1]), ("lm_head", [2], [0])):
        name = next(each for each in made.layers if each.endswith(layer))
        if layer == "lm_head":
            assert made.members.layers[name].experts == (1, 2)
            present = [1, 2]
        w_BTE = made.weights(x_BTI, name)
        assert torch.equal(w_BTE.sum(dim=-1), torch.ones(2, 3))
        terms = []
        for b, t in [(b, t) for b in rows for t in range(3) if mask_BT[b, t]]:
            logits = {e: (x_BTI[b, t] @ made.gates_[name][e]).detach() for e in present}
            total = torch.stack(list(logits.values())).logsumexp(dim=0)
            terms.append(float(total - logits[2 if b == 0 else 0]))
            assert int(w_BTE[b, t].argmax()) == max(present, key=logits.get)
        expected += sum(terms) / len(terms)
    assert float(made.losses(made.step)["domain"].detach()) == pytest.approx(0.3 * expected, rel=1e-5)
    assert made_of(pool, eta=0.0).losses(made.step) == {}


def test_fit_teaches_layers_which_experts_rows_they_read(model, pool, tokenizer):
    made, engine = made_of(pool, eta=1.0), Composer(model, pool, tokenizer=tokenizer)
    made.fit(engine, DATA, steps=60, lr=0.02, batch_size=6, warmup=0, progress=False)
    domain = made.report["terms"]["domain"]
    assert sum(domain[-5:]) < sum(domain[:5])


def test_rows_that_name_no_expert_and_an_eta_below_0_are_refused(model, pool, tokenizer):
    engine = Composer(model, pool, tokenizer=tokenizer)
    with pytest.raises(InvalidTask, match="whose task it is"):
        made_of(pool).fit(engine, [("abc", "cba")], steps=1, progress=False)
    with pytest.raises(WeightingError, match="eta of router 'mixture_of_adapters' is -1"):
        made_of(pool, eta=-1)
