"""Mixture-of-LoRAs' routers of layers, taught by the experts of rows."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, num_terms
from transformers import DynamicCache

from loraweave.composer.composer import Composer
from loraweave.errors import InvalidTask, ScopeError
from loraweave.extensions.routers.by_sequence import RunningSums
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._saved import router

DATA = {"a": [("abc abc", "cba"), ("ba ba", "ab")], "b": [("1 2 3", "1"), ("22 1", "2")], "c": [("X Y", "Z"), ("YY Z", "X")]}

IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [0, 0, 7, 8, 3], [4, 4, 4, 4, 4]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


def made_of(pool, **options):
    torch.manual_seed(2)
    return router("mixture_of_adapters", pool, **options)


def sharp(pool, **options):
    """One whose decisions differ from token to token."""
    made = made_of(pool, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape))
    return made


def running_means(x_BTI, g_EI, present, mask_BT):
    """mean_BTE by its definition, 0 before the first real token."""
    rows = []
    for x_TI, mask_T in zip(x_BTI.double(), mask_BT, strict=True):
        seen, row = [], []
        for x_I, real in zip(x_TI, mask_T, strict=True):
            if real:
                score_P = torch.stack([(g_EI[e].double() * x_I).sum() for e in present])
                p_P = score_P.exp() / score_P.exp().sum()
                seen.append(torch.zeros(len(g_EI), dtype=torch.double).index_add(0, torch.tensor(present), p_P))
            row.append(torch.stack(seen).sum(dim=0) / len(seen) if seen else torch.zeros(len(g_EI), dtype=torch.double))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def logits_of(model, pool, made, ids_BT=IDS_BT, **arguments):
    with torch.no_grad(), Composer(model, pool).activate(made):
        return model(ids_BT, **arguments).logits


@torch.no_grad()
def generated(model, pool, made, ids_BT=IDS_BT, mask_BT=MASK_BT, **settings):
    with Composer(model, pool).activate(made):
        return model.generate(ids_BT, attention_mask=mask_BT, **{**GREEDY, **settings})


@pytest.mark.own_models
def test_the_expert_of_a_token_has_the_highest_mean_over_the_real_tokens_up_to_it(model, pool):
    made, inputs = sharp(pool), {}
    for layer in pool.layer_names:
        model.get_submodule(layer).register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0]}))
    engine = Composer(model, pool)
    with torch.no_grad(), engine.activate(made):
        model(IDS_BT, attention_mask=MASK_BT)
    moved = 0
    for layer in pool.layer_names:
        present = list(made.members.layers[layer].experts)
        w_BTE = engine.last_weights[layer].expand(3, 5, 3)
        expected_BTE = running_means(inputs[layer], made.gates_[layer], present, MASK_BT)
        by_token = layer == "lm_head"
        if by_token:
            scores_BTE = inputs[layer].double() @ made.gates_[layer].double().T
            expected_BTE = torch.full((3, 5, 3), -torch.inf, dtype=torch.double)
            expected_BTE[..., present] = scores_BTE[..., present]
        best_BT = expected_BTE.argmax(dim=-1)
        assert torch.equal(w_BTE.argmax(dim=-1)[MASK_BT.bool()], best_BT[MASK_BT.bool()])
        assert torch.equal(w_BTE.sum(dim=-1), torch.ones(3, 5))
        moved += 0 if by_token else int((best_BT[0] != best_BT[0, 0]).any())
    assert moved


def test_its_gradient_is_that_of_the_mean(model, pool):
    made = sharp(pool)
    layer = next(name for name in made.layers if name.endswith("v_proj"))
    x_BTI, c_BTE = torch.randn(3, 5, 16), torch.randn(3, 5, 3)
    w_BTE = made.begin(model, {"input_ids": IDS_BT, "attention_mask": MASK_BT}).weights(x_BTI, layer)
    (w_BTE * c_BTE).sum().backward()
    g_EI = made.gates_[layer].detach().double().requires_grad_()
    present = list(made.members.layers[layer].experts)
    (running_means(x_BTI, g_EI, present, MASK_BT) * c_BTE).sum().backward()
    assert torch.allclose(made.gates_[layer].grad.double(), g_EI.grad, atol=1e-4)


@pytest.mark.parametrize("block", [0, 1])
def test_a_call_that_broke_off_leaves_the_sums_as_the_cache_is(block, model, pool, cache_argument):
    made, cache, name = sharp(pool), DynamicCache(), cache_argument(model)
    whole = logits_of(model, pool, made, use_cache=False)

    def interrupted(*_):
        raise RuntimeError("stop")

    with torch.no_grad(), Composer(model, pool).activate(made):
        model(IDS_BT[:, :3], **{name: cache})
        hook = model.model.layers[block].register_forward_pre_hook(interrupted)
        with pytest.raises(RuntimeError, match="stop"):
            model(IDS_BT[:, 1:2], **{name: cache})
        hook.remove()
        if block:
            # of which the first block took a token and the second did not
            assert cache.get_seq_length() == 4
            with pytest.raises(ScopeError, match=r"layers.1.*did not run once for each"):
                model(IDS_BT[:, :1], **{name: cache})
            return
        rest = model(IDS_BT[:, 3:], **{name: cache}).logits
    assert_near(rest, whole[:, 3:], num_terms(model))


def test_decisions_of_a_row_do_not_depend_on_other_rows_nor_on_later_tokens(model, pool):
    made = sharp(pool)
    whole = logits_of(model, pool, made, attention_mask=MASK_BT)
    changed_BT = IDS_BT.clone()
    changed_BT[0] = 17
    changed_BT[:, 4] = 21
    found = logits_of(model, pool, made, changed_BT, attention_mask=MASK_BT)
    assert torch.allclose(found[1:, :4][MASK_BT[1:, :4].bool()], whole[1:, :4][MASK_BT[1:, :4].bool()], atol=1e-6)
    assert not torch.allclose(found[1:, 4], whole[1:, 4], atol=1e-3)


def test_gates_that_know_each_rows_domain_give_that_domains_adapter(make_model, make_adapter):
    model = make_model("llama", dtype=torch.float64)
    pool = ExpertPool([make_adapter(model, name, rank=2, seed=seed) for seed, name in enumerate("abc")])
    made = made_of(pool)
    made.scores = lambda x_BTI, layer: torch.eye(3)[[2, 0, 1]][:, None].expand(-1, x_BTI.shape[1], -1)
    found = logits_of(model, pool, made, attention_mask=MASK_BT)
    for row, name in enumerate("cab"):
        expected = logits_of(model, pool, {name: 1.0}, attention_mask=MASK_BT)
        assert torch.allclose(found[row], expected[row], atol=1e-6)


@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning")
@pytest.mark.own_models
def test_gradient_checkpointing_gives_the_same_gradient_and_sums_nothing_twice(model, pool, monkeypatch):
    found, put, own = [], [], RunningSums.put
    monkeypatch.setattr(RunningSums, "put", lambda state, layer, sums_BTE: (put.append(layer), own(state, layer, sums_BTE)))
    for checkpointing in (False, True):
        made = sharp(pool).train()
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        with Composer(model, pool).activate(made):
            model(IDS_BT, attention_mask=MASK_BT, labels=IDS_BT).loss.backward()
        found.append(made)
    assert sorted(put) == sorted(2 * [layer for layer in pool.layer_names if layer != "lm_head"])
    for plain, saving in zip(*(each.parameters() for each in found), strict=True):
        assert torch.allclose(plain.grad, saving.grad, atol=1e-5)
        assert bool(plain.grad.any())


def test_each_token_can_decide_for_itself(model, pool):
    made = sharp(pool, decision="token")
    assert not made.needs_call
    layer = made.layers[0]
    x_BTI = torch.randn(2, 4, 16)
    scores_BTE = made.scores(x_BTI, layer)
    assert torch.equal(made.weights(x_BTI, layer).argmax(dim=-1), scores_BTE.argmax(dim=-1))
    assert torch.equal(generated(model, pool, made), generated(model, pool, made, use_cache=False))
    assert not torch.equal(generated(model, pool, made), generated(model, pool, sharp(pool)))


def test_where_the_tokens_are_not_known_it_is_refused_by_name(model, pool, make_model, make_adapters):
    made = sharp(pool)
    with pytest.raises(ScopeError, match="decides by the tokens so far"):
        made.weights(torch.randn(1, 2, 16), made.layers[0])
    with torch.no_grad(), Composer(model, pool).activate(made):
        for mask in (torch.ones(3, 1, 5, 5), torch.ones(3, 4)):
            with pytest.raises(ScopeError, match=r"attention mask .* decision='token'"):
                model(IDS_BT, attention_mask=mask)
    with pytest.raises(ScopeError, match="no input_ids"):
        made.begin(model, {"pixel_values": torch.zeros(1, 3, 4, 4)})
    call = made.begin(model, {"input_ids": IDS_BT})
    with pytest.raises(ScopeError, match=r"for the \(3, 5\) rows and tokens .* sees \(1, 15\) others"):
        call.weights(torch.randn(1, 15, 16), made.layers[1])
    other = make_model("t5")
    experts = ExpertPool(make_adapters(other, "t5"))
    with torch.no_grad(), Composer(other, experts).activate(made_of(experts, decision="token")):
        other(input_ids=IDS_BT, decoder_input_ids=IDS_BT)


def test_a_layer_that_runs_twice_a_call_cannot_be_gone_on_with(model, pool, cache_argument):
    made, cache = sharp(pool), DynamicCache()
    layer, x_BTI = next(name for name in made.layers if name.endswith("v_proj")), torch.randn(3, 5, 16)
    call = made.begin(model, {"input_ids": IDS_BT, cache_argument(model): cache})
    assert torch.equal(call.weights(x_BTI, layer), call.weights(x_BTI, layer))
    cache.update(torch.zeros(3, 1, 5, 1), torch.zeros(3, 1, 5, 1), 0)
    with pytest.raises(ScopeError, match="did not run once for each"):
        made.begin(model, {"input_ids": IDS_BT, cache_argument(model): cache}).weights(x_BTI, layer)


def test_it_goes_to_where_a_layer_is(model, pool):
    made = sharp(pool)
    call = made.begin(model, {"input_ids": IDS_BT, "attention_mask": MASK_BT})
    for layer in made.layers:
        x_BTI = torch.empty(3, 5, made.members.layers[layer].num_inputs, device="meta")
        assert call.weights(x_BTI, layer).device.type == "meta"


@pytest.mark.parametrize("decision", ["token", "sequence"])
def test_the_loss_is_eta_times_the_sum_over_layers_of_the_cross_entropy_with_the_rows_expert(decision, model, pool):
    made = made_of(pool, eta=0.3, decision=decision)
    mask_BT = torch.tensor([[0, 1, 1], [1, 1, 1]])
    made.step = Step(mask_BT, torch.tensor([2, 0]))
    x_BTI = torch.randn(2, 3, 16)
    asked = made if decision == "token" else made.begin(model, {"input_ids": mask_BT, "attention_mask": mask_BT})
    expected = 0.0
    for layer, present, rows in (("q_proj", [0, 2], [0, 1]), ("v_proj", [0, 1, 2], [0, 1]), ("lm_head", [2], [0])):
        name = next(each for each in made.layers if each.endswith(layer))
        if layer == "lm_head":
            assert made.members.layers[name].experts == (1, 2)
            present = [1, 2]
        w_BTE = asked.weights(x_BTI, name)
        assert torch.equal(w_BTE.sum(dim=-1), torch.ones(2, 3))
        terms = []
        for b, t in [(b, t) for b in rows for t in range(3) if mask_BT[b, t]]:
            logits = {e: (x_BTI[b, t] @ made.gates_[name][e]).detach() for e in present}
            total = torch.stack(list(logits.values())).logsumexp(dim=0)
            terms.append(float(total - logits[2 if b == 0 else 0]))
            if decision == "token":
                assert int(w_BTE[b, t].argmax()) == max(present, key=logits.get)
        expected += sum(terms) / len(terms)
    assert float(made.losses(made.step)["domain"].detach()) == pytest.approx(0.3 * expected, rel=1e-5)
    assert made_of(pool, eta=0.0).losses(made.step) == {}


def test_a_decoders_padding_counts_in_no_loss(make_model, make_adapters):
    model = make_model("t5")
    pool = ExpertPool(make_adapters(model, "t5"))
    rows = [
        {"input_ids": [5, 9, 11, 2], "labels": [7, 8, 9, 2], "expert": "c"},
        {"input_ids": [7, 3], "labels": [5, 2], "expert": "a"},
    ]
    torch.manual_seed(3)
    made = router("mixture_of_adapters", pool, eta=0.3, decision="token")
    alone = []
    for row in rows:
        made.step = Step(torch.ones(1, len(row["input_ids"])), torch.tensor([pool.places[row["expert"]]]))
        with torch.no_grad(), Composer(model, pool).activate(made):
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        alone.append(made.step)
    expected = 0.0
    for layer, routed in made.members.layers.items():
        logs = [
            step.scores[layer].log_softmax(dim=-1)[0, :, int(step.expert_B)]
            for step in alone
            if int(step.expert_B) in routed.experts
        ]
        expected -= float(torch.cat(logs).mean())
    made.fit(Composer(model, pool), rows, steps=1, batch_size=2, lr=1e-9, progress=False)
    assert made.report["terms"]["domain"] == pytest.approx([0.3 * expected], rel=1e-5)


def test_fit_teaches_layers_which_experts_rows_they_read(model, pool, tokenizer):
    made, engine = made_of(pool, eta=1.0), Composer(model, pool, tokenizer=tokenizer)
    made.fit(engine, DATA, steps=60, lr=0.02, batch_size=6, warmup=0, progress=False)
    domain = made.report["terms"]["domain"]
    assert sum(domain[-5:]) < sum(domain[:5])


def test_rows_that_name_no_expert_are_refused(model, pool, tokenizer):
    engine = Composer(model, pool, tokenizer=tokenizer)
    with pytest.raises(InvalidTask, match="whose task it is"):
        made_of(pool).fit(engine, [("abc", "cba")], steps=1, progress=False)
