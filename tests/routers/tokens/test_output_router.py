"""What routers over outputs know of their experts, against the updates themselves."""

from __future__ import annotations

import pytest
import torch

from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router
from loraweave.types import Factors

ROUTERS = ("adapter_fusion", "mole", "ramole")


@pytest.fixture
def pool():
    draw = torch.Generator().manual_seed(0)
    gains = [Factors(torch.zeros(0, 20), torch.zeros(7, 0), gain_O=torch.randn(7, generator=draw)) for _ in range(2)]
    parts = [Factors(torch.randn(r, 20, generator=draw), torch.randn(12, r, generator=draw)) for r in (4, 15)]
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
