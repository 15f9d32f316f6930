"""States that are kept beside a caller's key-value cache, and follow it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, MistralConfig, StaticCache

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError
from loraweave.extensions.routers.last_hidden import _cache_like
from loraweave.routers.tokens._caches import BesideCache, FollowedCaches
from loraweave.routers.tokens._call import CachedIds
from loraweave.routers.weights import MixtureWeights

IDS_BT = torch.tensor([[5, 9, 11, 2], [7, 8, 3, 30]])


def cache_with(num_rows, num_tokens):
    """A cache whose keys are numbers of row and token."""
    cache = DynamicCache()
    for layer in range(2):
        keys = 10 * torch.arange(num_rows)[:, None, None, None] + torch.arange(num_tokens)[None, None, :, None].float()
        cache.update(keys, keys.clone(), layer)
    return cache


def ids_in(cache):
    return cache.layers[0].keys[:, 0, :, 0].long()


CHANGES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "reorder by name": lambda cache: cache.reorder_cache(beam_idx=torch.tensor([2, 0, 0])),
    "crop": lambda cache: cache.crop(-2),
    "crop nothing": lambda cache: cache.crop(0),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
}


@pytest.fixture
def beside():
    return BesideCache("ids")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_is_changed_as_its_cache_is(beside, change):
    cache = cache_with(3, 5)
    beside.keep(cache, CachedIds(ids_in(cache)))
    second = BesideCache("keys")
    second.keep(cache, cache_with(3, 5))
    change(cache)
    assert torch.equal(beside.of(cache).ids_BT, ids_in(cache))
    assert torch.equal(ids_in(second.of(cache)), ids_in(cache))


def test_a_cache_that_was_reset_is_an_empty_one(beside):
    cache = cache_with(2, 3)
    state = CachedIds(ids_in(cache))
    beside.keep(cache, state)
    cache.reset()
    assert state.get_seq_length() == 0
    assert beside.of(cache) is None


def test_tokens_that_the_cache_did_not_take_are_taken_back(beside):
    cache = cache_with(1, 3)
    beside.keep(cache, CachedIds(torch.tensor([[0, 1, 2, 3, 4]])))
    assert beside.of(cache).ids_BT.tolist() == [[0, 1, 2]]


def test_a_cache_that_took_tokens_alone_is_refused(beside):
    cache = cache_with(1, 3)
    with pytest.raises(ScopeError, match="of the 3 in this one it has seen 0: begin with an empty cache"):
        beside.of(cache)
    beside.keep(cache, CachedIds(ids_in(cache)))
    cache.update(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), 0)
    with pytest.raises(ScopeError, match="of the 5 in this one it has seen 3"):
        beside.of(cache)


def test_caches_that_cannot_be_followed_are_refused_by_name(beside, make_model):
    static = StaticCache(config=make_model("llama").config, max_cache_len=8)
    with pytest.raises(ScopeError, match="a StaticCache, with layers of class StaticLayer: leave cache_implementation out"):
        beside.of(static)
    with pytest.raises(ScopeError, match="a tuple, which is not a transformers cache"):
        beside.of(((torch.zeros(1), torch.zeros(1)),))
    offloaded = cache_with(1, 3)
    offloaded.offloading = True
    with pytest.raises(ScopeError, match="a DynamicCache, which is offloaded"):
        beside.of(offloaded)
    replaced = cache_with(1, 3)
    replaced.crop = print
    with pytest.raises(ScopeError, match="whose crop was replaced"):
        beside.of(replaced)


def test_nothing_is_left_on_the_cache_when_the_activation_ends(beside):
    cache, caches = cache_with(2, 3), FollowedCaches()
    before = dict(vars(cache))
    with caches.entered():
        beside.keep(cache, CachedIds(ids_in(cache)))
    assert type(cache) is not DynamicCache
    assert isinstance(cache, DynamicCache)
    caches.release()
    assert type(cache) is DynamicCache
    assert vars(cache) == before


def test_a_cache_that_stayed_as_it_was_goes_on_in_the_next_activation(beside):
    cache, caches = cache_with(2, 3), FollowedCaches()
    with caches.entered():
        beside.keep(cache, CachedIds(ids_in(cache)))
    caches.release()
    assert torch.equal(beside.of(cache).ids_BT, ids_in(cache))
    # nobody followed
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ScopeError, match="it has seen 0"):
        beside.of(cache)


def test_a_deep_copy_has_a_state_of_its_own(beside):
    cache, caches = cache_with(2, 3), FollowedCaches()
    with caches.entered():
        beside.keep(cache, CachedIds(ids_in(cache)))
        copied = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        beside.keep(copied, beside.of(copied))
        copied.crop(-1)
    assert torch.equal(beside.of(cache).ids_BT, ids_in(cache))
    assert torch.equal(beside.of(copied).ids_BT, ids_in(copied))
    assert ids_in(copied).tolist() == [[0, 1], [10, 11]]
    caches.release()
    assert type(copied) is DynamicCache


def test_a_pickle_or_a_shallow_copy_is_of_the_caches_own_class(beside):
    cache = cache_with(2, 3)
    beside.keep(cache, CachedIds(ids_in(cache)))
    for copied in (pickle.loads(pickle.dumps(cache)), copy.copy(cache)):
        assert type(copied) is DynamicCache
        assert torch.equal(ids_in(copied), ids_in(cache))
        with pytest.raises(ScopeError, match="it has seen 0"):
            beside.of(copied)


def test_a_cache_and_its_state_go_together_without_waiting_for_a_collection(beside):
    cache = cache_with(2, 3)
    state = CachedIds(ids_in(cache))
    beside.keep(cache, state)
    watched = weakref.ref(cache), weakref.ref(state)
    gc.disable()
    try:
        del cache, state
        assert [one() for one in watched] == [None, None]
    finally:
        gc.enable()


class Reader:
    """A router that reads the text so far, and notes what it reads."""

    def __init__(self, experts):
        self.experts = experts
        self.beside = BesideCache("reader")
        self.read = []

    def begin(self, model, arguments):
        cache = arguments.get("cache", arguments.get("past_key_values"))
        state = None if cache is None else self.beside.of(cache)
        if state is None:
            state = CachedIds(arguments["input_ids"])
        else:
            state.append(arguments["input_ids"])
        if cache is not None:
            self.beside.keep(cache, state)
        self.read.append(state.ids_BT)
        return MixtureWeights.of({self.experts[0]: 0.5}, self.experts)

    def weights(self, x_BTI, layer):
        raise AssertionError("the router of the call is asked")


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampling beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_it_reads_with_the_cache_what_it_reads_without(way, make_model, make_adapters):
    model = make_model("llama")
    adapters = make_adapters(model, "llama")
    engine, found = Composer(model, adapters), []
    ids_BT = torch.tensor([[5, 9, 5, 9, 5]]) if "prompt_lookup_num_tokens" in way else IDS_BT
    for use_cache in (True, False) if "prompt_lookup_num_tokens" not in way else (True,):
        reader = Reader(tuple(a.name for a in adapters))
        torch.manual_seed(0)
        with torch.no_grad(), engine.activate(reader):
            output = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=8,
                min_new_tokens=8,
                use_cache=use_cache,
                **way,
            )
        found.append((reader.read, output))
    if len(found) == 2:
        assert torch.equal(found[0][1], found[1][1])
        assert all(torch.equal(*pair) for pair in zip(found[0][0], found[1][0], strict=True))
    else:
        # the last two may be guesses; wrong ones are not there in the next call
        ((read, output),) = found
        assert any(not torch.equal(seen_BT, output[:, : seen_BT.shape[1]]) for seen_BT in read)
        for seen_BT in read:
            num_sure = max(seen_BT.shape[1] - 2, 5)
            assert torch.equal(seen_BT[:, :num_sure], output[:, :num_sure])


@pytest.mark.parametrize("recording", [False, True])
def test_a_cache_of_windows_keeps_what_may_be_taken_back_where_the_callers_does(recording):
    model = SimpleNamespace(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    given = DynamicCache(config=model.config)
    if recording:
        given.activate_past_recording()
    assert [layer.record_past for layer in _cache_like(given, model).layers] == [recording] * 2
    assert not any(layer.record_past for layer in _cache_like(None, model).layers)
