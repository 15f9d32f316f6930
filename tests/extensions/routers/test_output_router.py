"""What routers over outputs know of their experts, against the updates themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import random_factors

from loraweave.composer.composer import Composer
from loraweave.errors import AdapterUnsupported
from loraweave.extensions.routers.outputs import OutputRouter
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._saved import router, router_class, router_names
from loraweave.types import Factors

ROUTERS = [name for name in router_names() if issubclass(router_class(name), OutputRouter)]
# by which 15 steps tell
LEARNING_RATES = {"mole": 0.05}


@pytest.fixture
def pool():
    draw = torch.Generator().manual_seed(0)
    gains = [Factors(torch.zeros(0, 20), torch.zeros(7, 0), gain_O=torch.randn(7, generator=draw)) for _ in range(2)]
    parts = [random_factors(draw, rank, 12, 20) for rank in (4, 15)]
    zero = Factors(torch.randn(2, 20, generator=draw), torch.zeros(12, 2))
    return ExpertPool(
        [
            Adapter("a", "tiny", {"q": parts[0], "v": gains[0]}),
            Adapter("b", "tiny", {"q": parts[1], "v": gains[1]}),
            Adapter("zero", "tiny", {"q": zero}),
        ]
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_bases_and_latents_are_the_outputs_and_as_long(name, pool):
    made = router(name, pool)
    x_BTI = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    z_BTS, owner_S = made.latents(x_BTI, "q"), made.owners_["q"]
    lengths_BTE = made.by_expert(z_BTS.square(), "q").sqrt()
    for place, adapter in enumerate(pool.adapters.values()):
        mine_S = owner_S == place
        output_BTO = x_BTI @ adapter.layers["q"].a_RI.T @ adapter.layers["q"].b_OR.T
        assert torch.allclose(z_BTS[..., mine_S] @ made.bases_["q"][mine_S], output_BTO, atol=1e-4)
        assert torch.allclose(lengths_BTE[..., place], output_BTO.norm(dim=-1), atol=1e-4)
    # of rank 4, of rank 15 with 12 outputs, and of rank 2
    assert owner_S.bincount().tolist() == [4, 12, 2]


@pytest.mark.parametrize("name", ROUTERS)
def test_layers_with_gains_alone_have_no_parameters_and_weigh_alike(name, pool, tmp_path):
    made = router(name, pool)
    assert not any(parameter.endswith(".v") for parameter, _ in made.named_parameters())
    x_BTI = torch.randn(2, 3, 20)
    expected = torch.tensor([0.5, 0.5, 0.0]).expand(2, 3, 3)
    assert torch.equal(made.weights(x_BTI, "v"), expected)
    made.save_pretrained(tmp_path / "router")
    again = router(tmp_path / "router")
    assert torch.equal(again.weights(x_BTI, "v"), expected)
    assert torch.equal(again.weights(x_BTI, "q"), made.weights(x_BTI, "q"))


@pytest.mark.parametrize("name", ["arrow", *ROUTERS])
def test_unbound_experts_are_refused_by_name(name, pool):
    dora = replace(pool["b"].layers["q"], magnitude_O=torch.ones(12))
    with pytest.raises(AdapterUnsupported, match="'dora' is not bound"):
        router(name, pool.including("dora", Adapter("dora", "tiny", {"q": dora})))


@pytest.mark.parametrize("name", ROUTERS)
def test_training_lowers_the_loss(name, make_model, make_adapters):
    model = make_model("llama").requires_grad_(False)
    pool = ExpertPool(make_adapters(model, "llama"))
    torch.manual_seed(0)
    made = router(name, pool).train()
    ids_BT = torch.randint(3, 61, (2, 8))
    optimiser = torch.optim.Adam(made.parameters(), lr=LEARNING_RATES.get(name, 0.02))
    losses = []
    with Composer(model, pool).activate(made):
        for number in range(16):
            made.step = Step(torch.ones(2, 8), torch.full((2,), -1))
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
            losses.append(loss.item())
            optimiser.zero_grad()
            (loss + sum(made.losses(made.step).values())).backward()
            optimiser.step()
            if number == 14:
                made.eval()
    assert losses[-1] < losses[0] - 0.05
