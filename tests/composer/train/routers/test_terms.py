"""Terms beside the loss."""

from __future__ import annotations

import math

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.composer.train.routers import balance_loss, z_loss
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._scores import top_k_softmax

MASK_BT = torch.tensor([[0, 1, 1], [1, 1, 1]])


def step_of(scores_BTE, top_k=None):
    return Step(MASK_BT, torch.full((2,), -1), scores={"x": scores_BTE}, weights={"x": top_k_softmax(scores_BTE, top_k)})


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_balance_loss_is_the_number_of_experts_where_one_gets_all_and_1_where_all_get_alike(top_k):
    scores_BTE = torch.zeros(2, 3, 4)
    # equal scores, but each expert is chosen as often as the others
    scores_BTE[0, 1] += 1e-6 * torch.tensor([4.0, 3, 2, 1])
    scores_BTE[0, 2] += 1e-6 * torch.tensor([3.0, 4, 1, 2])
    scores_BTE[1, 0] += 1e-6 * torch.tensor([1.0, 2, 4, 3])
    scores_BTE[1, 1] += 1e-6 * torch.tensor([2.0, 1, 3, 4])
    scores_BTE[1, 2] += torch.zeros(4)
    assert float(balance_loss(step_of(scores_BTE, top_k))) == pytest.approx(1, abs=1e-4)
    one = torch.tensor([0.0, 60, 0, 0]).expand(2, 3, 4)
    assert float(balance_loss(step_of(one, 1))) == pytest.approx(4)


def test_the_balance_loss_is_its_formula_over_the_real_tokens_and_the_layers_own_experts():
    scores_BTE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores_BTE[..., 2] = -math.inf
    scores_BTE[0, 0] = 1e3
    step = step_of(scores_BTE, 2)
    tokens = [scores_BTE[b, t, [0, 1, 3]] for b in range(2) for t in range(3) if MASK_BT[b, t]]
    total_f, total_p = torch.zeros(3), torch.zeros(3)
    for scores_E in tokens:
        exp_E = scores_E.exp()
        total_p = total_p + exp_E / exp_E.sum()
        kept_E = torch.where(scores_E >= scores_E.sort().values[-2], exp_E, 0.0)
        total_f = total_f + kept_E / kept_E.sum()
    assert float(balance_loss(step)) == pytest.approx(float(3 * (total_f / 5 * total_p / 5).sum()), rel=1e-9)


def test_the_z_loss_is_the_mean_square_of_the_log_of_the_partition_sum():
    scores_BTE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sum(
        math.log(sum(math.exp(s) for s in scores_BTE[b, t].tolist())) ** 2
        for b in range(2)
        for t in range(3)
        if MASK_BT[b, t]
    )
    assert float(z_loss(step_of(scores_BTE))) == pytest.approx(expected / 5, rel=1e-9)


# of prompt and target, with one as long as the longest of the other, and targets of one token
@pytest.mark.parametrize(
    "lengths", [[(4, 3), (2, 2)], [(4, 4), (2, 2)], [(5, 3), (3, 1)], [(3, 1), (5, 1)], [(1, 2), (1, 4)]]
)
@pytest.mark.parametrize(("kind", "targets"), [("t5", ("q", "v", "wo")), ("bart", ("q_proj", "v_proj", "fc2"))])
def test_padding_of_encoder_and_decoder_counts_in_no_term(kind, targets, lengths, make_model, make_adapter, gates):
    model = make_model(kind)
    pool = ExpertPool([make_adapter(model, name, targets=targets[at:], seed=at) for at, name in enumerate("abc")])
    made, twin = gates(pool), gates(pool)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    twin.load_state_dict(made.state_dict())
    ids = [7, 9, 11, 30, 5, 12]
    rows = [{"input_ids": ids[:prompt], "labels": ids[-target:]} for prompt, target in lengths]
    engine = Composer(model, pool)
    made.fit(engine, rows, steps=1, batch_size=2, balance=1.0, z=1.0, lr=1e-9, progress=False)
    alone = []
    for row in rows:
        twin.step = Step(torch.ones(1, len(row["input_ids"])), torch.tensor([-1]))
        with torch.no_grad(), engine.activate(twin):
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        alone.append(twin.step)
    terms, loads = {"balance": [], "z": []}, []
    for layer in alone[0].scores:
        scores_NE = torch.cat([step.scores[layer].flatten(0, 1) for step in alone])
        share_NE = scores_NE.softmax(dim=1)
        terms["balance"].append(len(made.members.layers[layer].experts) * share_NE.mean(dim=0).square().sum())
        terms["z"].append(scores_NE.logsumexp(dim=1).square().mean())
        loads.append(share_NE.mean(dim=0))
    for name, found in terms.items():
        assert made.report["terms"][name] == pytest.approx([float(torch.stack(found).mean())], rel=1e-4)
    load_E = torch.stack(loads).mean(dim=0)
    assert made.report["load"][0][1] == pytest.approx(load_E.tolist(), abs=1e-4)


def test_the_balance_loss_pulls_down_the_scores_of_who_has_most():
    scores_BTE = torch.tensor([1.0, 0.0, 0.0]).expand(2, 3, 3).clone().requires_grad_()
    balance_loss(step_of(scores_BTE)).backward()
    assert bool((scores_BTE.grad[MASK_BT.bool()][:, 0] > 0).all())
    assert not scores_BTE.grad[0, 0].any()
