"""Routers that see each call of the model: the same under a cache, in threads, and in some rows of a batch."""

from __future__ import annotations

import threading

import pytest
import torch
from rounding import assert_near, num_terms
from transformers import DynamicCache

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router, router_names

IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [0, 0, 7, 8, 3], [4, 4, 4, 4, 4]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
OPTIONS = {"xlora": {"hidden_size": 16, "layerwise": True}}


@pytest.fixture(params=[name for name in ("mixture_of_adapters", "xlora") if name in router_names()])
def name(request):
    return request.param


def made_of(name, pool, seed=2):
    """One whose weights differ from token to token."""
    torch.manual_seed(seed)
    made = router(name, pool, **OPTIONS.get(name, {})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_((0.5 if name == "xlora" else 3) * torch.randn(parameter.shape))
    return made


def logits_of(model, pool, made, **arguments):
    with torch.no_grad(), Composer(model, pool).activate(made):
        return model(IDS_BT, use_cache=False, **arguments).logits


@torch.no_grad()
def generated(model, pool, made, ids_BT=IDS_BT, mask_BT=MASK_BT, **settings):
    with Composer(model, pool).activate(made):
        return model.generate(ids_BT, attention_mask=mask_BT, **{**GREEDY, **settings})


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "sampling beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_generation_with_the_cache_is_generation_without(name, kind, way, make_model, make_adapters):
    model = make_model(kind)
    pool = ExpertPool(make_adapters(model, kind))
    made, found = made_of(name, pool), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generated(model, pool, made, use_cache=use_cache, **way))
    assert torch.equal(*found)


def test_guesses_from_the_prompt_change_nothing(name, model, pool):
    made, ids_BT = made_of(name, pool), torch.tensor([[5, 9, 5, 9, 5]])
    settings = {"ids_BT": ids_BT, "mask_BT": torch.ones_like(ids_BT), "max_new_tokens": 24, "min_new_tokens": 24}
    plain, guessed = (generated(model, pool, made, **settings, **more) for more in ({}, {"prompt_lookup_num_tokens": 3}))
    assert torch.equal(plain, guessed)


def test_a_conversation_goes_on_under_its_cache(name, model, pool, cache_argument):
    argument, made, cache, engine = cache_argument(model), made_of(name, pool), DynamicCache(), Composer(model, pool)
    whole = logits_of(model, pool, made, attention_mask=MASK_BT)
    found = []
    # other calls in between and another activation change nothing
    for first, last in ((0, 3), (3, 4), (4, 5)):
        with torch.no_grad(), engine.activate(made):
            model(IDS_BT.flip(0))
            found.append(model(IDS_BT[:, first:last], attention_mask=MASK_BT[:, :last], **{argument: cache}).logits)
    assert_near(torch.cat(found, dim=1), whole, num_terms(model))
    with torch.no_grad():
        model(IDS_BT[:, :2], **{argument: cache})
        with engine.activate(made), pytest.raises(ScopeError, match="of the 7 in this one it has seen 0"):
            model(IDS_BT[:, :2], **{argument: cache})


def test_a_call_that_makes_the_cache_itself_can_be_gone_on_from(name, model, pool, cache_argument):
    made, argument, cache, found = made_of(name, pool), cache_argument(model), None, []
    with torch.no_grad(), Composer(model, pool).activate(made):
        for first, last in ((0, 2), (2, 3), (3, 5)):
            output = model(IDS_BT[:, first:last], use_cache=True, **{argument: cache})
            cache = output[argument]
            found.append(output.logits)
    assert_near(torch.cat(found, dim=1), logits_of(model, pool, made), num_terms(model))
    assert type(cache) is DynamicCache


@pytest.mark.parametrize("name", [name for name in ("lora_flow", "mixture_of_adapters", "xlora") if name in router_names()])
def test_two_threads_that_generate_at_once_are_each_as_alone(name, model, pool):
    made, engine, together, found = made_of(name, pool), Composer(model, pool), threading.Barrier(2), {}
    rows = {number: IDS_BT[[number], : 5 - number] for number in (0, 2)}

    def generate(number):
        with torch.no_grad(), engine.activate(made):
            together.wait()
            found[number] = model.generate(rows[number], attention_mask=torch.ones_like(rows[number]), **GREEDY)

    threads = [threading.Thread(target=generate, args=(number,)) for number in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, ids_BT in rows.items():
        assert torch.equal(found[number], generated(model, pool, made, ids_BT, torch.ones_like(ids_BT)))


def test_some_rows_of_a_batch_have_it_and_others_not(name, model, pool):
    made, other = made_of(name, pool), made_of(name, pool, seed=3)
    for mixtures in ([made, None, other], [made, other, made], [None, made, made]):
        for ways in ({}, {"num_beams": 2}):
            alone = [generated(model, pool, {} if each is None else each, **ways) for each in mixtures]
            found = generated(model, pool, mixtures, **ways)
            assert torch.equal(found, torch.stack([each[row] for row, each in enumerate(alone)]))


@pytest.mark.own_models
def test_a_static_cache_and_an_encoder_decoder_are_refused_by_name(name, model, pool, make_model, make_adapters):
    with pytest.raises(ScopeError, match="StaticCache"):
        generated(model, pool, made_of(name, pool), cache_implementation="static")
    other = make_model("t5")
    experts = ExpertPool(make_adapters(other, "t5"))
    engine, made = Composer(other, experts), made_of(name, experts)
    with torch.no_grad(), engine.activate(made), pytest.raises(ScopeError, match="an encoder and"):
        other(input_ids=IDS_BT, decoder_input_ids=IDS_BT)
