"""Small experts whose weights depend on the task of the row."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.errors import ScopeError, UnknownName

TASKS = ("ct", "mri", "drugs")
LAYER = "model.layers.1.self_attn.q_proj"
IDS_BT = torch.tensor([[3, 9, 27, 20], [5, 25, 3, 15]])


def test_a_site_adds_its_formula(adds_up):
    def weights(made, row, x_TI, x_I):
        gate = made.gates[LAYER.replace(".", "/")]
        return functional.softmax(gate.g_ED @ gate.e_KD[(2, 0)[row]], dim=0)

    options = {"tasks": TASKS, "rank": 6, "num_experts": 3, "alpha": 9.0, "num_features": 5}
    adds_up("moelora", LAYER, {"input_ids": IDS_BT, "task": ["drugs", "ct"]}, weights, 9.0 / 6, **options)


@pytest.mark.parametrize("shared", [False, True])
def test_the_adapter_of_a_task_is_the_model_of_that_task(make_model, shared, trained):
    model = make_model("llama", dtype=torch.float64)
    with lw.experts("moelora", model, tasks=TASKS, rank=4, num_experts=4, shared=shared) as made:
        own = trained(made)(input_ids=IDS_BT, task="mri").logits
        adapter, other = made.adapter("mri"), made.adapter("ct")
    assert adapter.name == "moelora-mri"
    with lw.Composer(model, lw.ExpertPool([adapter, other])).activate({adapter.name: 1.0}):
        torch.testing.assert_close(model(input_ids=IDS_BT).logits, own, rtol=1e-4, atol=1e-5)
    with lw.Composer(model, lw.ExpertPool([adapter, other])).activate({other.name: 1.0}):
        assert not torch.allclose(model(input_ids=IDS_BT).logits, own, rtol=1e-2)


def test_the_mixture_without_a_task_is_no_adapter(make_model):
    with lw.experts("moelora", make_model("llama"), tasks=TASKS) as made, pytest.raises(ScopeError, match="give task="):
        made.adapter()


@pytest.mark.parametrize("shared", [False, True])
def test_a_gate_is_of_each_site_or_of_all(make_model, shared):
    with lw.experts("moelora", make_model("llama"), tasks=TASKS, shared=shared) as made:
        assert len(made.layers) == 14
        assert len(made.gates) == (1 if shared else 14)


def test_a_begins_normal_with_a_standard_deviation_of_a_hundredth(make_model):
    with lw.experts("moelora", make_model("llama"), tasks=TASKS) as made:
        a = torch.cat([layer.a_SI.detach().flatten() for layer in made.layers.values()])
        # 14 sites of 16 rows: the error of a standard deviation from n numbers is 1 / sqrt(2 n) of it
        assert abs(float(a.std()) / 0.01 - 1) < 5 / (2 * len(a)) ** 0.5
        assert abs(float(a.mean())) < 5 * 0.01 / len(a) ** 0.5


def test_an_encoder_and_its_decoder_generate_by_the_task(make_model, trained):
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with lw.experts("moelora", make_model("t5"), tasks=TASKS, target_modules=("q", "v")) as made:
        together = trained(made).generate(input_ids=IDS_BT, task=["drugs", "ct"], **settings)
        for row, task in enumerate(("drugs", "ct")):
            alone = made.generate(input_ids=IDS_BT[row : row + 1], task=task, **settings)
            length = min(alone.shape[1], together.shape[1])
            assert torch.equal(together[row, :length], alone[0, :length])
            # what follows an end is padding
            assert not together[row, length:].any()
            assert not alone[0, length:].any()


def test_a_task_that_there_is_not_is_refused_by_name(make_model):
    with lw.experts("moelora", make_model("llama"), tasks=TASKS) as made:
        with pytest.raises(UnknownName, match=r"no task 'drug', did you mean 'drugs'\?; it has 'ct', 'mri', 'drugs'"):
            made(input_ids=IDS_BT, task="drug")
        with pytest.raises(UnknownName, match="no task -1"):
            made(input_ids=IDS_BT, task=[-1, 0])
        with pytest.raises(ScopeError, match="3 tasks were given for 2 rows"):
            made(input_ids=IDS_BT, task=[0, 1, 2])


def test_without_tasks_there_is_nothing_to_call_it_for_until_there_are_some(make_model):
    with lw.experts("moelora", make_model("llama")) as made:
        with pytest.raises(UnknownName, match=r"it has none: pass tasks=\(\.\.\.\) or fit\(\) it on \{task: rows\}"):
            made(input_ids=IDS_BT, task=0)
        made.take_tasks(TASKS)
        made(input_ids=IDS_BT, task=["mri", "ct"])
        assert set(made.adapter("drugs").layers) == set(made.sites)
