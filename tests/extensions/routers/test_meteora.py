"""MeteoRA: the formula, the term that teaches it, and rows in which one task follows the other."""

from __future__ import annotations

import math

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.errors import InvalidTask, WeightingError
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._saved import router

# each task has tokens of its own
TOKENS = {"a": range(4, 8), "b": range(21, 25), "c": range(41, 45)}


@pytest.fixture
def made_of(random_pool):
    every = {"q": (2, 20, 12), "v": (2, 20, 12)}
    pool = random_pool(every, every, {"q": (2, 20, 12)}, every)

    def make(**options):
        torch.manual_seed(2)
        return router("meteora", pool, **options).double()

    return make


@pytest.mark.parametrize(("layer", "present"), [("q", [0, 1, 2, 3]), ("v", [0, 1, 3])])
def test_the_best_experts_of_a_token_share_it_by_their_scores_over_the_temperature(made_of, x_BTI, layer, present):
    made = made_of(top_k=2, temperature=3.0)
    w_BTE = made.weights(x_BTI, layer)
    for x_I, w_E in zip(x_BTI.flatten(0, 1), w_BTE.flatten(0, 1), strict=True):
        s_E = (made.gates_[layer] @ x_I).tolist()
        best = sorted(present, key=lambda e: -s_E[e])[:2]
        total = sum(math.exp(s_E[e] / 3) for e in best)
        assert w_E.tolist() == pytest.approx([math.exp(s_E[e] / 3) / total if e in best else 0.0 for e in range(4)])


def test_its_term_is_one_mean_over_the_taught_tokens_of_all_layers(made_of, x_BTI):
    made = made_of(eta=0.5)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    made.step = Step(mask_BT, torch.tensor([2, 1]))
    for layer in ("q", "v"):
        made.weights(x_BTI, layer)
    losses = []
    # the third expert leaves v alone
    for layer, row, own in (("q", 0, 2), ("q", 1, 1), ("v", 1, 1)):
        for x_I in x_BTI[row][mask_BT[row].bool()]:
            e_E = (made.gates_[layer] @ x_I).exp().tolist()
            seen = e_E if layer == "q" else [e_E[0], e_E[1], e_E[3]]
            losses.append(-math.log(e_E[own] / sum(seen)))
    assert float(made.losses(made.step)["domain"].detach()) == pytest.approx(0.5 * sum(losses) / 11)


def test_rows_of_single_tasks_teach_it_to_switch_in_rows_of_several(model, pool, tokenizer):
    draw = torch.Generator().manual_seed(1)

    def tokens(name, count):
        own = TOKENS[name]
        return [own[int(place)] for place in torch.randint(len(own), (count,), generator=draw)]

    rows = [{"input_ids": (ids := tokens(name, 9)), "labels": [-100] * 4 + ids[4:], "expert": name} for name in TOKENS] * 6
    torch.manual_seed(0)
    made = router("meteora", pool, top_k=1)
    engine = Composer(model, pool, tokenizer=tokenizer)
    made.fit(engine, rows, steps=40, batch_size=6, lr=0.05, progress=False)
    parts = ("b", "a", "c", "a")
    ids = torch.tensor([[token for name in parts for token in tokens(name, 6)]])
    with torch.no_grad(), engine.activate(made):
        model(ids)
    layer = next(name for name in pool.layer_names if len(made.members.layers[name].experts) == 3)
    own = torch.tensor([pool.names.index(name) for name in parts for _ in range(6)])
    right = engine.last_weights[layer][0].argmax(dim=-1) == own
    assert float(right.float().mean()) > 0.8


def test_rows_without_an_expert_and_more_experts_than_the_pool_has_are_refused(model, pool, tokenizer):
    with pytest.raises(InvalidTask, match="expert"):
        router("meteora", pool).fit(Composer(model, pool, tokenizer=tokenizer), [("x", "y")], steps=1)
    with pytest.raises(WeightingError, match="top_k=9"):
        router("meteora", pool, top_k=9)
