"""A small expert that clients exchange beside one that stays with each."""

import pytest
import torch

import loraweave as lw
from loraweave.errors import UnknownName
from loraweave.extensions.recipes import with_options

LAYER = "model.layers.1.mlp.up_proj"
IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])


def test_a_site_adds_its_formula(adds_up):
    options = {"rank": 3, "shared_rank": 2, "mu": 0.2, "alpha": 6.0}
    adds_up("local_and_shared", LAYER, {"input_ids": IDS_BT}, lambda made, row, x_TI, x_I: (0.2, 0.8), 6.0 / 3, **options)


def test_the_adapter_is_the_model(make_model, trained):
    model = make_model("llama", dtype=torch.float64)
    with lw.experts("local_and_shared", model, rank=3, shared_rank=2) as made:
        own = trained(made)(input_ids=IDS_BT).logits
        adapter = made.adapter()
    with lw.Composer(model, lw.ExpertPool([adapter])).activate({adapter.name: 1.0}):
        torch.testing.assert_close(model(input_ids=IDS_BT).logits, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("phase", "learns"), [("local", 1), ("shared", 0)])
def test_one_expert_learns_in_each_phase_and_the_other_stays_the_same_bits(make_model, phase, learns, trained):
    with lw.experts("local_and_shared", make_model("llama"), phase=phase) as made:
        before = [trained(made).expert(0), made.expert(1)]
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
        made.train()(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
        optimizer.step()
        assert [made.expert(number).hash == before[number].hash for number in (0, 1)] == [learns == 1, learns == 0]


def test_from_one_phase_to_the_other_both_experts_stay_the_same_bits(make_model, trained):
    first = trained(lw.experts("local_and_shared", make_model("llama"), phase="local"))
    before, whole = [first.expert(0).hash, first.expert(1).hash], first(input_ids=IDS_BT).logits
    with with_options(first, phase="shared") as made:
        assert [made.expert(0).hash, made.expert(1).hash] == before
        torch.testing.assert_close(made(input_ids=IDS_BT).logits, whole)
        assert all(layer.a_SI.shape[0] == 4 for layer in made.layers.values())
    assert all(parameter.requires_grad for parameter in made.base_model.parameters())


def test_one_that_was_saved_as_pfedlora_is_the_same_bits(make_model, trained, tmp_path):
    model = make_model("llama")
    with trained(lw.experts("local_and_shared", model, rank=3)) as made:
        expected = made(input_ids=IDS_BT).logits
        made.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "experts.json"
    file.write_text(file.read_text().replace('"recipe": "local_and_shared"', '"recipe": "pfedlora"'))
    with lw.experts(tmp_path / "saved", model) as made:
        assert torch.equal(made(input_ids=IDS_BT).logits, expected)


def test_the_former_name_is_refused_with_what_has_it_now(make_model):
    with pytest.raises(UnknownName, match=r"named 'local_and_shared' now, .* strategy='pfedlora'"):
        lw.experts("pfedlora", make_model("llama"))
