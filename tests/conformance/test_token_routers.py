"""What every router of routers/ that looks at the input must do: one case for each file of routers/tokens."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from properties import Properties
from rounding import assert_near, num_terms
from transformers import DynamicCache

from loraweave.composer.compose.compose import compose
from loraweave.composer.compose.composition import Composition
from loraweave.composer.composer import Composer
from loraweave.composer.train.progress import checkpointed_blocks
from loraweave.errors import ScopeError, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._saved import router, router_class, router_names
from loraweave.types import Factors, Task

ROUTERS = router_names()
LEARNED = [name for name in ROUTERS if router_class(name).learned]
PROPERTIES = Properties(ROUTERS)
# what a router cannot do without, besides the pool
NEEDED = {
    "similarity": {"embedder": "hashing"},
    "logistic": {"embedder": "hashing"},
    # gates of more than one kind of module
    "wemoe": {"gated": ("mlp", "self_attn")},
    "twin_merging": {"embedder": "hashing", "shared": "a"},
    "lorauter": {
        "embedder": "hashing",
        "tasks": {"first": ["f j l"], "second": ["e e e", "f e"]},
        "losses": {"first": {"a": 0.2, "b": 0.1, "c": 0.5, "d": 1.0}, "second": {"a": 0.1, "b": 0.2, "c": 0.3, "d": 1.0}},
    },
}
IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [0, 0, 7, 8, 3], [4, 4, 4, 4, 4]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
POSITIONS_BT = (MASK_BT.cumsum(dim=1) - 1).clamp(min=0)


class Letters:
    """A tokenizer as far as routers need one: a letter for each token."""

    def decode(self, ids, *, skip_special_tokens):
        return " ".join("abcdefghijklmnopqrstuvwxyz"[token % 26] for token in ids)


def composer(model, pool):
    return Composer(model, pool, tokenizer=Letters())


def shown(adapter, examples):
    return replace(adapter, card={"examples": examples})


@PROPERTIES.given
def model(make_model):
    return make_model("llama")


@PROPERTIES.given
def pool(model, make_adapters):
    texts = [["f j l", "c e"], ["h i d", "h h"], ["e e e", "f e"]]
    return ExpertPool([shown(a, own) for a, own in zip(make_adapters(model, "llama"), texts, strict=True)])


def measured(made):
    """With means for those that have none yet, as fit() of average_activation leaves them."""
    for layer in getattr(made, "means_", ()):
        for expert, mean_I in zip(made.experts, made.means_[layer], strict=True):
            if not bool(mean_I.any()):
                mean_I.normal_(generator=torch.Generator().manual_seed(sum(expert.encode())))


def make(name, pool):
    torch.manual_seed(3)
    made = router(name, pool, **NEEDED.get(name, {}))
    measured(made)
    # what is learned starts where all experts count alike, which would hide mistakes
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape))
    return made


def weights_of(model, pool, made, rows=slice(None), columns=slice(None)):
    """{layer: w_BTE} and logits of one forward of the rows."""
    engine = composer(model, pool)
    inputs = {
        "input_ids": IDS_BT[rows, columns],
        "attention_mask": MASK_BT[rows, columns],
        "position_ids": POSITIONS_BT[rows, columns],
    }
    with torch.no_grad(), engine.activate(made):
        logits = model(**inputs).logits
    used = engine.last_weights
    shape = (*inputs["input_ids"].shape, len(used.experts))
    return {layer: used[layer].expand(shape) for layer in used}, logits


@torch.no_grad()
def generated(model, pool, made, **settings):
    """Six tokens after each row."""
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": MASK_BT, "pad_token_id": 0}
    with composer(model, pool).activate(made):
        return model.generate(IDS_BT, **greedy, **settings)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_keeps_all_properties(name, request, make_model, make_adapter, make_adapters, tokenizer):
    shared = {"make_model": make_model, "make_adapter": make_adapter, "make_adapters": make_adapters, "tokenizer": tokenizer}
    PROPERTIES.walk(request, name, **shared)


@PROPERTIES.add()
def weights_are_finite_numbers_for_the_experts_of_the_pool(name, model, pool):
    made = make(name, pool)
    assert made.experts == pool.names
    weights, _ = weights_of(model, pool, made)
    assert set(weights) == set(pool.layer_names)
    for layer, w_BTE in weights.items():
        assert bool(torch.isfinite(w_BTE).all())
        absent = [place for place, a in enumerate(pool.adapters.values()) if layer not in a.layers]
        assert not bool(w_BTE[..., absent].any())


@PROPERTIES.add()
def weights_of_every_token_sum_to_1_where_the_router_says_so(name, model, pool):
    made = make(name, pool)
    weights, _ = weights_of(model, pool, made)
    sums = torch.cat([w_BTE[MASK_BT.bool()].sum(dim=-1) for w_BTE in weights.values()])
    if made.simplex:
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


@PROPERTIES.add()
def it_is_deterministic(name, model, pool):
    made = make(name, pool)
    assert not made.training
    assert torch.equal(weights_of(model, pool, made)[1], weights_of(model, pool, made)[1])


@PROPERTIES.add()
def a_row_does_not_depend_on_the_others_nor_on_padding(name, model, pool):
    made = make(name, pool)
    weights, logits = weights_of(model, pool, made)
    alone, own = weights_of(model, pool, made, rows=[1], columns=slice(2, None))
    assert_near(logits[1, 2:], own[0], num_terms(model))
    for layer, w_BTE in alone.items():
        assert_near(weights[layer][1, 2:], w_BTE[0], num_terms(model))


@PROPERTIES.add()
def generation_with_the_cache_is_generation_without(name, model, pool):
    made = make(name, pool)
    assert torch.equal(generated(model, pool, made, use_cache=True), generated(model, pool, made, use_cache=False))


@PROPERTIES.add()
def the_order_of_the_experts_does_not_matter(name, model, pool):
    first = make(name, pool)
    if first.learned:
        pytest.skip("its parameters are in the order of the experts")
    turned = pool.subset(reversed(pool.names))
    second = make(name, turned)
    assert_near(weights_of(model, turned, second)[1], weights_of(model, pool, first)[1], num_terms(model))


@PROPERTIES.add()
def other_factors_of_the_same_updates_give_the_same_weights(name, model, pool):
    draw = torch.Generator().manual_seed(3)

    def turned(part):
        gauge_RR = torch.eye(part.rank, dtype=torch.float64) * 2 + 0.1 * torch.randn(part.rank, part.rank, generator=draw)
        b_OR = part.b_OR.double() @ torch.linalg.inv(gauge_RR)
        return replace(part, a_RI=(gauge_RR @ part.a_RI.double()).float(), b_OR=b_OR.float())

    layers = {own: {layer: turned(part) for layer, part in a.layers.items()} for own, a in pool.adapters.items()}
    other = ExpertPool([replace(a, layers=layers[own]) for own, a in pool.adapters.items()])
    found, expected = weights_of(model, other, make(name, other))[0], weights_of(model, pool, make(name, pool))[0]
    for layer, w_BTE in expected.items():
        assert torch.allclose(found[layer], w_BTE, atol=1e-4)


@PROPERTIES.add()
def every_parameter_gets_a_gradient_through_the_model(name, model, pool):
    made = make(name, pool).train()
    if not made.learned:
        assert list(made.parameters()) == []
        return
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with composer(model, pool).activate(made):
        model(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    still = [name for name, parameter in made.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert still == []


@PROPERTIES.add(of=LEARNED)
def blocks_that_run_again_for_their_gradients_give_the_same(name, model, pool):
    made, gradients = make(name, pool).train(), []
    model.requires_grad_(False)
    for checkpointing in (False, True):
        made.zero_grad()
        made.step = Step(torch.ones_like(IDS_BT), torch.tensor([0, 1, 2]))
        torch.manual_seed(5)
        with composer(model, pool).activate(made), checkpointed_blocks(model, checkpointing):
            loss = model(input_ids=IDS_BT, labels=IDS_BT, use_cache=False).loss
            (loss + sum(made.losses(made.step).values())).backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in made.named_parameters()})
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], gradient, atol=1e-5), key
    assert any(bool(gradient.any()) for gradient in gradients[0].values())


@PROPERTIES.add()
def gradients_through_it_are_finite(name, model, pool):
    made = make(name, pool)
    # a token whose every hidden value is 0 in the first layer
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS_BT[0, 0]] = 0
    with composer(model, pool).activate(made):
        model(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in (*model.parameters(), *made.parameters()) if p.grad is not None)


@PROPERTIES.add()
def another_pool_is_refused_by_name(name, model, pool, make_adapter):
    made = make(name, pool)
    changed = pool.including("b", make_adapter(model, "b", rank=2, targets=("q_proj",), seed=99))
    with pytest.raises(WeightingError, match="for an expert 'b' with hash"), composer(model, changed).activate(made):
        pass
    fewer = pool.subset(["c", "a"])
    with pytest.raises(WeightingError, match="in this order"), composer(model, fewer).activate(made):
        pass


@PROPERTIES.add()
def saved_and_read_again_it_gives_the_same_logits(name, model, pool, tmp_path):
    made = make(name, pool)
    made.save_pretrained(tmp_path / "router")
    again = router(tmp_path / "router")
    assert type(again) is type(made)
    assert again.options == made.options
    assert torch.equal(weights_of(model, pool, again)[1], weights_of(model, pool, made)[1])


@PROPERTIES.add()
def for_a_pool_of_other_order_and_more_experts_it_gives_the_same_logits(name, model, pool, make_adapter, tmp_path):
    made = make(name, pool)
    made.save_pretrained(tmp_path / "router")
    larger = ExpertPool({"new": make_adapter(model, "new", rank=2, targets=("o_proj", "q_proj")), "x": pool["b"]})
    for other in ("c", "a"):
        larger = larger.including(other, pool[other])
    again = router(tmp_path / "router", larger)
    assert again.experts == ("new", "x", "c", "a")
    # a layer that the new expert alone updates has no weights
    assert not again.simplex
    weights, logits = weights_of(model, larger, again)
    assert_near(logits, weights_of(model, pool, made)[1], num_terms(model))
    assert not any(w_BTE[..., 0].any() for w_BTE in weights.values())
    assert torch.equal(generated(model, larger, again), generated(model, pool, made))


@PROPERTIES.add()
def an_expert_that_joins_and_leaves_again_leaves_the_rest_as_it_was(name, model, pool, make_adapter, tmp_path):
    made = make(name, pool)
    new = shown(make_adapter(model, "new", rank=3, targets=("q_proj", "o_proj")), ["b h j"])
    if any(part.per_expert is None for part in made.parts):
        with pytest.raises(ScopeError, match="'new'"):
            made.add_expert("new", new)
        with pytest.raises(ScopeError, match="'b'"):
            made.remove_expert("b")
        return
    more = made.add_expert("new", new)
    measured(more)
    larger = pool.including("new", new)
    assert set(weights_of(model, larger, more)[0]) == set(larger.layer_names)
    back = more.remove_expert("new")
    assert {key: value.tolist() for key, value in back.state_dict().items()} == {
        key: value.tolist() for key, value in made.state_dict().items()
    }
    fewer = made.remove_expert("b")
    weights_of(model, pool.without("b"), fewer)
    # with the last expert of a layer goes the layer
    left = make(name, larger).remove_expert("new")
    again = router(left.save_pretrained(tmp_path / "left"), pool)
    assert torch.equal(weights_of(model, pool, again)[1], weights_of(model, pool, left)[1])


@PROPERTIES.add()
def experts_that_need_their_base_layers_are_routed_as_bound_ones(name, model, pool):
    dora = {
        layer: replace(part, magnitude_O=torch.linspace(0.5, 2, len(part.b_OR))) for layer, part in pool["a"].layers.items()
    }
    # a layer of its own has but a bias, whose file does not say how many inputs the layer has
    bias = Factors(torch.zeros(0, 0), torch.zeros(16, 0), base_bias_O=torch.linspace(-1, 1, 16))
    alone = {"model.layers.1.self_attn.o_proj": bias, "model.layers.0.self_attn.q_proj": bias}
    unbound = pool.including("a", replace(pool["a"], layers=dora)).including("d", replace(pool["c"], name="d", layers=alone))
    engine = composer(model, unbound)
    made = make(name, engine.bound_pool)
    with torch.no_grad(), engine.activate(made):
        logits = model(IDS_BT).logits
    assert bool(torch.isfinite(logits).all())
    weights, expected = weights_of(model, engine.bound_pool, made, rows=slice(2, None))
    assert_near(logits[2:], expected, num_terms(model))
    assert set(weights) == set(unbound.layer_names)


@PROPERTIES.add()
def the_model_is_bit_for_bit_what_it_was_after_an_error(name, model, pool):
    made = make(name, pool)
    with torch.no_grad():
        before = model(IDS_BT).logits

    def interrupted(*_):
        raise RuntimeError("stop")

    hook = model.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), composer(model, pool).activate(made):
        model(IDS_BT)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(IDS_BT).logits, before)


@PROPERTIES.add()
def a_composition_by_it_is_the_same_when_read_again(name, model, pool, tokenizer, tmp_path):
    task = Task([("a", "ab"), ("b c", "ba")], instruction="swap")
    composed = compose(model, tokenizer, pool, task, method=make(name, pool), progress=False)
    again = Composition.from_pretrained(composed.save_pretrained(tmp_path / "composed"), model, tokenizer)
    assert again.losses() == composed.losses()
    assert again.predict(["a c"]) == composed.predict(["a c"])
    rise = composed.leave_one_out()
    assert list(rise) == list(pool.names)
    assert all(math.isfinite(value) for value in rise.values())


@PROPERTIES.add(of=[name for name in ROUTERS if name != "lora_flow"])
def rows_of_a_batch_have_it_in_its_own_precision_below_autocast(name, model, pool):
    made = make(name, pool)
    engine, whole = composer(model, pool), {}
    for mixture in (made, [made] * len(IDS_BT)):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), engine.activate(mixture):
            model(input_ids=IDS_BT, attention_mask=MASK_BT, position_ids=POSITIONS_BT)
        used = engine.last_weights
        for layer in used:
            w_BTE = used[layer].expand(*IDS_BT.shape, -1)
            assert w_BTE.dtype is torch.float32
            assert torch.allclose(whole.setdefault(layer, w_BTE), w_BTE, atol=1e-5)


@PROPERTIES.add()
def a_copy_and_a_pickle_give_the_same_logits(name, model, pool):
    made = make(name, pool)
    logits = weights_of(model, pool, made)[1]
    for again in (deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(weights_of(model, pool, again)[1], logits)


@PROPERTIES.add()
def a_cache_that_the_model_made_is_continued_like_one_that_was_passed(name, model, pool):
    made, found = make(name, pool), []
    for cache in (None, DynamicCache(config=model.config)):
        with torch.no_grad(), composer(model, pool).activate(made):
            begun = model(IDS_BT[:, :3], cache=cache, use_cache=True)
            found.append(model(IDS_BT[:, 3:], cache=begun.cache, use_cache=True).logits)
    assert torch.equal(*found)
