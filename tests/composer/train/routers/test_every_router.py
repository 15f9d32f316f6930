"""Every learned router of the registry, trained."""

from __future__ import annotations

import pytest
import torch

from loraweave import registry
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._saved import router, router_names

LEARNED = [name for name in router_names() if issubclass(registry.get("routers", name), LearnedRouter)]
SETTINGS = {"steps": 5, "batch_size": 4, "warmup": 0, "progress": False}


@pytest.mark.parametrize("name", LEARNED)
def test_every_parameter_learns_and_the_loss_of_the_data_falls(name, engine, model, pool, data):
    torch.manual_seed(0)
    made = router(name, pool)
    before = {key: value.detach().clone() for key, value in made.named_parameters()}
    # what learns whose a row is lowers another loss than the model's: with random adapters the two have little in common
    settings = {**SETTINGS, "steps": 40} | ({} if made.needs_experts else {"evaluation": data, "evaluate_every": 40})
    made.fit(engine, data, **settings)
    if made.needs_experts:
        own = made.report["terms"].get("domain", made.report["losses"])
        assert sum(own[-5:]) < sum(own[:5])
    else:
        (_, first), (_, last) = made.report["evaluations"]
        assert last < first
    assert [key for key, value in made.named_parameters() if torch.equal(before[key], value)] == []
    assert made.report["kept"] == 40


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"mixed_precision": "bf16"}])
def test_it_trains_with_what_saves_memory(name, engine, pool, data, setting):
    torch.manual_seed(0)
    plain = router(name, pool)
    saving = router(name, pool)
    saving.load_state_dict(plain.state_dict())
    # steps so small that rounding turns no choice of an expert
    plain.fit(engine, data, lr=1e-3, **SETTINGS)
    saving.fit(engine, data, lr=1e-3, **SETTINGS, **setting)
    within = 0.05 if "mixed_precision" in setting else 1e-3
    assert saving.report["losses"] == pytest.approx(plain.report["losses"], rel=within)


@pytest.mark.parametrize("name", LEARNED)
def test_its_load_is_watched_and_its_balance_can_be_asked_for(name, engine, pool, data):
    made = router(name, pool).fit(engine, data, balance=0.01, z=0.001, **SETTINGS)
    assert len(made.report["entropy"]) == 5
    assert {"balance", "z"} <= set(made.report["terms"])
