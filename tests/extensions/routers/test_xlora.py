"""X-LoRA against its formula and against peft's, with and without caches."""

from __future__ import annotations

import warnings

import pytest
import torch
from rounding import assert_near, num_terms

from loraweave.composer.composer import Composer
from loraweave.errors import WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router

IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [0, 0, 7, 8, 3], [4, 4, 4, 4, 4]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture
def pool(model, make_adapter):
    """Of three experts that update the same layers."""
    return ExpertPool([make_adapter(model, name, rank=rank, seed=rank) for name, rank in (("0", 2), ("1", 3), ("2", 4))])


def xlora(pool, **options):
    torch.manual_seed(1)
    made = router("xlora", pool, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return made


def last_hidden(model, ids_BT):
    with torch.no_grad():
        return model(ids_BT, output_hidden_states=True).hidden_states[-1]


def used(model, pool, made, ids_BT=IDS_BT):
    """{layer: w_BTE} and logits of one call."""
    engine = Composer(model, pool)
    with torch.no_grad(), engine.activate(made):
        logits = model(ids_BT).logits
    return {layer: engine.last_weights[layer] for layer in engine.last_weights}, logits


@pytest.mark.own_models
def test_weights_are_the_softmax_of_a_network_on_the_last_hidden_state(model, pool):
    made = xlora(pool, depth=3, size=7, layerwise=True, temperature=0.7, global_scaling=1.5)
    first, second, last = (layer for layer in made.head if isinstance(layer, torch.nn.Linear))
    hidden_BTD = last_hidden(model, IDS_BT).double()
    for layer in (first, second):
        hidden_BTD = (hidden_BTD @ layer.weight.double().T + layer.bias.double()).clamp(min=0)
    logits = hidden_BTD @ last.weight.double().T + last.bias.double()
    weights, _ = used(model, pool, made)
    assert list(made.layers) == sorted(weights)
    for place, layer in enumerate(made.layers):
        own_BTE = logits[..., 3 * place : 3 * place + 3] / 0.7
        expected_BTE = 1.5 * own_BTE.exp() / own_BTE.exp().sum(dim=-1, keepdim=True)
        assert torch.allclose(weights[layer].double(), expected_BTE, atol=1e-5)


@pytest.mark.own_models
def test_the_top_k_of_all_ways_of_softmax(model, pool):
    logits_BTE = None
    for softmax in ("top_k", "all", "twice", "none"):
        made = xlora(pool, top_k=2, softmax=softmax)
        logits_BTE = last_hidden(model, IDS_BT) @ made.head[0].weight.T + made.head[0].bias
        smallest_BT = logits_BTE.argmin(dim=-1, keepdim=True)
        p_BTE = logits_BTE.softmax(dim=-1)
        cut_BTE = p_BTE.scatter(-1, smallest_BT, 0.0)
        e_BTE = cut_BTE.exp().scatter(-1, smallest_BT, 0.0)
        expected_BTE = {
            "top_k": cut_BTE / cut_BTE.sum(dim=-1, keepdim=True),
            "all": cut_BTE,
            "twice": e_BTE / e_BTE.sum(dim=-1, keepdim=True),
            "none": logits_BTE.scatter(-1, smallest_BT, 0.0),
        }[softmax]
        for w_BTE in used(model, pool, made)[0].values():
            assert torch.allclose(w_BTE, expected_BTE, atol=1e-5)
        assert made.simplex is (softmax in ("top_k", "twice"))


def test_a_logit_of_zero_is_a_logit_like_others(model, pool):
    made = xlora(pool)
    with torch.no_grad():
        made.head[0].weight.zero_()
        made.head[0].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    for w_BTE in used(model, pool, made)[0].values():
        assert torch.allclose(w_BTE, torch.tensor([0.0, 1.0, -1.0]).softmax(dim=0).expand_as(w_BTE))


def test_a_head_that_always_says_one_expert_is_that_adapter(model, pool):
    made = xlora(pool)
    with torch.no_grad():
        made.head[0].weight.zero_()
        made.head[0].bias.copy_(torch.tensor([0.0, 200.0, 0.0]))
    with torch.no_grad(), Composer(model, pool).activate({"1": 1.0}):
        expected = model(IDS_BT).logits
    assert torch.allclose(used(model, pool, made)[1], expected, atol=1e-5)


def test_layers_share_weights_unless_each_has_its_own(model, pool):
    first, *others = used(model, pool, xlora(pool))[0].values()
    assert all(torch.equal(first, w_BTE) for w_BTE in others)
    first, *others = used(model, pool, xlora(pool, layerwise=True))[0].values()
    assert not any(torch.allclose(first, w_BTE, atol=1e-3) for w_BTE in others)


def test_weights_of_a_token_depend_on_no_later_one(model, pool):
    made = xlora(pool)
    changed_BT = IDS_BT.clone()
    changed_BT[:, 3:] = 17
    before, after = used(model, pool, made)[0], used(model, pool, made, changed_BT)[0]
    for layer, w_BTE in before.items():
        assert torch.allclose(w_BTE[:, :3], after[layer][:, :3], atol=1e-6)
        assert not torch.allclose(w_BTE[:, 3:], after[layer][:, 3:], atol=1e-3)


PARITY = {
    "as it comes": ({}, {"softmax": "all"}),
    "layerwise": ({"layerwise_scalings": True}, {"layerwise": True, "softmax": "all"}),
    "depth 2": ({"xlora_depth": 2, "xlora_size": 9}, {"depth": 2, "size": 9}),
    "depth 3, layerwise": (
        {"xlora_depth": 3, "xlora_size": 5, "layerwise_scalings": True},
        {"depth": 3, "size": 5, "layerwise": True},
    ),
    "temperature": ({"softmax_temperature": 0.4}, {"temperature": 0.4}),
    "top_k": ({"top_k_lora": 2}, {"top_k": 2, "softmax": "all"}),
    "top_k and softmax": (
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
        {"top_k": 2, "softmax": "top_k"},
    ),
    "both": ({"top_k_lora": 2, "enable_softmax_topk": True}, {"top_k": 2, "softmax": "twice"}),
    "no softmax": ({"enable_softmax": False}, {"softmax": "none"}),
    "scaling pass under the adapters": (
        {"scaling_pass_value": 0.3, "global_scaling_weight": 0.6},
        {"scaling_pass_value": 0.3, "global_scaling": 0.6},
    ),
    "global scaling": ({"global_scaling_weight": 0.6}, {"global_scaling": 0.6}),
}


def of_peft(model, pool, folder, settings):
    """peft's X-LoRA of the pool's adapters, with weights that matter."""
    import peft

    paths = {}
    for name, adapter in pool.adapters.items():
        paths[name] = str(adapter.save_pretrained(folder / name))
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=paths, **settings)
        made = peft.get_peft_model(model, config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in made.base_model.internal_xlora_classifier.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return made


@pytest.mark.parametrize(("theirs", "ours"), PARITY.values(), ids=PARITY)
def test_it_is_pefts_with_the_same_network(theirs, ours, model, pool, make_model, tmp_path):
    reference = of_peft(make_model("llama"), pool, tmp_path, theirs)
    with torch.no_grad():
        expected = reference(input_ids=IDS_BT, attention_mask=MASK_BT).logits
    made = router("xlora", pool, **ours).eval()
    state = {
        name.replace("layers.", "head."): t
        for name, t in reference.base_model.internal_xlora_classifier.state_dict().items()
    }
    if made.layerwise:
        # theirs are in the order of the model's modules
        order = [name for name, _ in model.named_modules() if name in made.layers]
        rows = torch.cat([3 * order.index(layer) + torch.arange(3) for layer in made.layers])
        last = max(state, key=lambda name: int(name.split(".")[1])).split(".")[1]
        state = {name: t[rows] if name.split(".")[1] == last else t for name, t in state.items()}
    made.load_state_dict(state)
    with torch.no_grad(), Composer(model, pool).activate(made):
        assert_near(model(input_ids=IDS_BT, attention_mask=MASK_BT).logits, expected, num_terms(model))


@pytest.mark.own_models
def test_a_scaling_pass_under_the_adapters_is_cached_and_not_recorded(model, pool, make_adapter):
    made = xlora(pool, scaling_pass_value=0.4)
    engine = Composer(model, pool)
    with torch.no_grad():
        with engine.activate({"0": 0.4, "1": 0.4, "2": 0.4}):
            hidden_BTD = last_hidden(model, IDS_BT)
        expected_BTE = (hidden_BTD @ made.head[0].weight.T + made.head[0].bias).softmax(dim=-1)
        with engine.activate(made), engine.record() as trace:
            model(IDS_BT)
        assert all(len(trace.calls(layer)) == 1 for layer in pool.layer_names)
        assert all(torch.allclose(engine.last_weights[layer], expected_BTE, atol=1e-5) for layer in pool.layer_names)
        settings = {"attention_mask": MASK_BT, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
        larger = ExpertPool({"0": make_adapter(model, "0", rank=2, seed=9), "2": pool["0"], "0b": pool["2"], "1": pool["1"]})
        found = []
        for where, mixed in ((engine, made), (Composer(model, larger), made.onto(larger))):
            for use_cache in (True, False):
                with where.activate(mixed):
                    found.append(model.generate(IDS_BT, do_sample=False, use_cache=use_cache, **settings))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.own_models
def test_a_row_that_trains_again_needs_no_scaling_pass_again(model, pool):
    rows = [{"input_ids": [5, 9, 11, 2 + number], "labels": [-100, 9, 11, 2 + number]} for number in range(5)]
    rows.append({"input_ids": [7, 8], "labels": [-100, 8]})
    calls, heads = [], []
    model.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for keeps in (True, False):
        calls.clear()
        torch.manual_seed(3)
        made = router("xlora", pool)
        if not keeps:
            # as if nothing fitted
            made._hidden = made._read
        made.fit(
            Composer(model, pool), rows, steps=9, batch_size=2, gradient_accumulation=1, seed=4, lr=1e-2, progress=False
        )
        heads.append(made.head[0].weight.detach())
        assert calls.count(True) == 9
        # three batches of two rows are an epoch
        assert calls.count(False) == (3 if keeps else 9)
    assert torch.allclose(*heads, atol=1e-5)


def test_a_classifier_that_reads_both_ways_has_weights_of_its_hidden_states(make_model, make_adapter):
    model = make_model("bert")
    pool = ExpertPool([make_adapter(model, name, targets=("query", "value"), seed=seed) for seed, name in enumerate("ab")])
    made = xlora(pool, hidden_size=16)
    batch = {"input_ids": IDS_BT, "attention_mask": MASK_BT}
    with torch.no_grad():
        hidden_BTD = model(**batch, output_hidden_states=True).hidden_states[-1]
        engine = Composer(model, pool)
        with engine.activate(made):
            model(**batch)
    expected_BTE = (hidden_BTD @ made.head[0].weight.T + made.head[0].bias).softmax(dim=-1)
    layer = next(name for name in pool.layer_names if name.endswith("query"))
    assert torch.allclose(engine.last_weights[layer], expected_BTE, atol=1e-5)


def test_the_head_is_as_large_as_hidden_states_are(model, make_model, pool, make_adapter):
    assert xlora(pool).hidden_size == 16
    made = xlora(pool, hidden_size=12)
    with torch.no_grad(), Composer(model, pool).activate(made), pytest.raises(WeightingError, match="hidden_size=16"):
        model(IDS_BT)
