"""Folders that PEFT saves of its POLY: an adapter for each task, a router over all, and PEFT's logits."""

import copy
import json
import warnings

import peft
import pytest
import torch
from rounding import assert_near, num_terms

import loraweave as lw
from loraweave.errors import AdapterCorrupt, AdapterUnsupported

CONFIG = "adapter_config.json"
IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [7, 8, 3, 30, 1]])

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning"
)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS_BT).logits


def ours(make_model, router, pool=None):
    model = make_model("llama").double()
    with lw.Composer(model, pool or router.pool).activate(copy.deepcopy(router).double()):
        return logits(model)


@pytest.fixture
def poly(make_model, tmp_path):
    """PEFT's POLY of three tasks, four skills and two splits, and its folder."""
    torch.manual_seed(3)
    sizes = {"r": 2, "n_tasks": 3, "n_skills": 4, "n_splits": 2}
    config = peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_weights=False, **sizes)
    made = peft.get_peft_model(make_model("llama"), config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "module_logits" in name:
                parameter.copy_(torch.randn(parameter.shape))
            elif "poly_lora" in name:
                parameter.mul_(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(tmp_path / "poly")
    return made, tmp_path / "poly"


def test_a_poly_that_peft_saved_has_an_adapter_for_each_task(make_model, poly, tmp_path):
    theirs, folder = poly
    router = lw.router(folder)
    assert router.experts == ("task_0", "task_1", "task_2")
    with torch.no_grad():
        expected = theirs(input_ids=IDS_BT, task_ids=torch.tensor([2, 1])).logits
        first = theirs(input_ids=IDS_BT, task_ids=torch.tensor([0, 0])).logits
    model = make_model("llama")
    engine = lw.Composer(model, router.pool)
    with engine.activate([{"task_2": 1.0}, {"task_1": 1.0}]):
        assert_near(logits(model), expected, num_terms(model))
    with engine.activate(router):
        assert_near(logits(model), first, num_terms(model))
    assert not torch.allclose(logits(model), first, atol=1e-2)
    with lw.Hub(tmp_path / "hub") as hub:
        records = hub.add_many([folder / name for name in router.experts]).records
        assert [record.name for record in records] == list(router.experts)
        with lw.Composer(model, hub.pool(["task_1", "task_2"])).activate([{"task_2": 1.0}, {"task_1": 1.0}]):
            assert_near(logits(model), expected, num_terms(model))
        with pytest.raises(AdapterUnsupported, match=r"has 3 tasks.*task_0' to .*task_2'; lw\.router\(folder\)\.pool"):
            hub.add(folder / "task_3")


def test_a_poly_of_one_task_is_an_adapter(make_model, tmp_path):
    torch.manual_seed(4)
    config = peft.PolyConfig(r=3, task_type="CAUSAL_LM", target_modules=["q_proj"], init_weights=False)
    theirs = peft.get_peft_model(make_model("llama"), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "poly")
    adapter = lw.Adapter.from_pretrained(tmp_path / "poly")
    assert adapter.rank == 3
    model = make_model("llama")
    with torch.no_grad(), lw.Composer(model, [adapter]).activate({adapter.name: 1.0}):
        expected = theirs(input_ids=IDS_BT, task_ids=torch.tensor([0, 0])).logits
        assert_near(logits(model), expected, num_terms(model))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"n_tasks": 4}, AdapterCorrupt, "module_logits"),
        ({"n_tasks": 10**6}, AdapterCorrupt, "n_tasks"),
        ({"r": 3}, AdapterCorrupt, "r=3 in the config"),
        ({"poly_type": "of_tomorrow"}, AdapterUnsupported, "poly_type"),
    ],
)
def test_a_poly_that_does_not_fit_its_config_is_refused_by_name(poly, fields, error, message):
    path = poly[1] / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(error, match=message):
        lw.router(poly[1])


def stored(tmp_path, put):
    """The router that a hub gives back from the formula that names it, after the hub into which it was put was closed."""
    with lw.Hub(tmp_path / "hub") as hub:
        assert put(hub).name == "mix"
        assert len(hub) == 0
    with lw.Hub(tmp_path / "hub") as hub:
        mix = lw.parse("@mix")
        router = mix.mixture(hub)
        assert mix.pool(hub).names == router.experts
        return router


def test_a_hub_keeps_a_poly_that_peft_saved(make_model, poly, tmp_path):
    theirs, folder = poly
    with torch.no_grad():
        expected = theirs.double()(input_ids=IDS_BT, task_ids=torch.tensor([0, 0])).logits
    router = stored(tmp_path, lambda hub: hub.add(str(folder), name="mix"))
    torch.testing.assert_close(ours(make_model, router), expected, atol=1e-5, rtol=1e-5)
