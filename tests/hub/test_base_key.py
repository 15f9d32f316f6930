"""The base model as a key: id, revision and fingerprint; namesakes are told apart, and the same weights are found."""

import warnings

import pytest
import tiny_hubs
import torch
from torch import nn

import loraweave as lw
from loraweave.errors import BaseModelMismatch, LayerMismatch
from loraweave.hub.base import fingerprint
from loraweave.types import BaseKey, Fingerprint

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


def model(seed=0, sizes=(5, 3), name="org/base", commit=None):
    torch.manual_seed(seed)
    built = nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], 4))
    built.name_or_path = name
    built.config = type("Config", (), {"_commit_hash": commit})()
    return built


def adapter(name, seed=0, layer="0", **fields):
    return tiny_hubs.adapter(seed, name, layers=[layer], **fields)


def names(records):
    return [record.name for record in records]


def test_the_key_of_a_model_has_its_id_commit_and_fingerprint():
    found = lw.base_key(model(commit=COMMIT))
    assert (found.id, found.revision) == ("org/base", COMMIT)
    assert found.fingerprint == fingerprint(model())
    nameless = nn.Linear(2, 2)
    nameless.name_or_path = None
    assert lw.base_key(nameless).id == ""


SHAPES, SAMPLED, OTHER = Fingerprint("s"), Fingerprint("s", (0.5,)), Fingerprint("s", (0.75,))


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (BaseKey("x"), BaseKey("x"), ""),
        (BaseKey("x"), BaseKey("y"), "the ids are 'x' and 'y'"),
        (BaseKey("x", COMMIT), BaseKey("x", COMMIT[:9]), ""),
        (BaseKey("x", COMMIT), BaseKey("x", "main"), ""),
        (BaseKey("x", COMMIT), BaseKey("x"), ""),
        (BaseKey("x", COMMIT), BaseKey("x", OTHER_COMMIT), f"the revisions are '{COMMIT}' and '{OTHER_COMMIT}'"),
        (BaseKey("x", None, SAMPLED), BaseKey("x", None, OTHER), "1 of 1 sampled weights differ, the first 0.5 and 0.75"),
        (BaseKey("x", None, SHAPES), BaseKey("x", None, Fingerprint("t")), "names and shapes hash to s and t"),
        # the same weights are the same model, under whatever id and from whatever commit
        (BaseKey("x", COMMIT, SAMPLED), BaseKey("/a/folder", OTHER_COMMIT, SAMPLED), ""),
        # the same shapes are not
        (BaseKey("x", None, SHAPES), BaseKey("y", None, SAMPLED), "the ids are 'x' and 'y'"),
        (BaseKey("x", None, SAMPLED), BaseKey("x"), ""),
        (BaseKey("x", alike=(BaseKey("y"),)), BaseKey("y"), ""),
    ],
)
def test_two_keys_are_one_model_unless_something_known_contradicts(left, right, reason):
    assert reason in left.differs(right)
    assert bool(left.differs(right)) == bool(reason)
    assert left.alike or bool(right.differs(left)) == bool(reason)


@pytest.mark.parametrize(
    ("left", "right", "contradicts", "proves"),
    [
        (BaseKey("x"), BaseKey("x"), False, True),
        (BaseKey("x"), BaseKey("y"), False, False),
        (BaseKey(""), BaseKey(""), False, False),
        (BaseKey("x", COMMIT), BaseKey("y", OTHER_COMMIT), False, False),
        (BaseKey("x", COMMIT), BaseKey("x", OTHER_COMMIT), True, None),
        (BaseKey("x", None, SAMPLED), BaseKey("y", None, SAMPLED), False, True),
        (BaseKey("x", None, SAMPLED), BaseKey("y", None, SHAPES), False, False),
        (BaseKey("x", None, SAMPLED), BaseKey("x", None, OTHER), True, None),
        (BaseKey("x", None, SHAPES), BaseKey("x", None, Fingerprint("t")), True, None),
    ],
)
def test_what_is_not_contradicted_need_not_be_proved(left, right, contradicts, proves):
    assert bool(left.contradicts(right)) is bool(right.contradicts(left)) is contradicts
    if proves is not None:
        assert left.proves(right) is right.proves(left) is proves


def test_records_are_found_by_id_or_by_the_key_of_a_model_at_hand(hub):
    hub.add(adapter("plain", 0))
    hub.add(adapter("bound", 1, fingerprint=fingerprint(model())))
    hub.add(adapter("elsewhere", 2, base_model="a folder", fingerprint=fingerprint(model())))
    hub.add(adapter("foreign", 3, base_model="org/other"))
    assert names(hub.records(base_model="org/base")) == ["plain", "bound"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(hub.records(base_model=lw.base_key(model()))) == ["plain", "bound", "elsewhere"]


def test_a_namesake_is_noticed_when_it_is_added_and_left_out_for_a_model_at_hand(hub):
    hub.add(adapter("first", 0, fingerprint=fingerprint(model(0))))
    with pytest.warns(UserWarning, match=r"'second' is stored, but its base 'org/base' is not.*sampled weights differ"):
        hub.add(adapter("second", 1, fingerprint=fingerprint(model(1))))
    with pytest.warns(UserWarning, match=r"1 adapters are left out, 'second' the first.*'org/base'.*sampled weights differ"):
        assert names(hub.records(base_model=lw.base_key(model(0)))) == ["first"]
    assert names(hub.records(base_model="org/base")) == ["first", "second"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # both are known by now
        hub.add(adapter("third", 2, fingerprint=fingerprint(model(1))))


def test_after_gc_only_the_fingerprints_of_adapters_that_are_there_count(hub):
    hub.add(adapter("first", 0, fingerprint=fingerprint(model(0))))
    hub.remove("first")
    hub.gc()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hub.add(adapter("second", 1, fingerprint=fingerprint(model(1))))
    generation = hub.generation
    hub.gc()
    assert hub.generation == generation


def test_binding_stores_the_key_of_the_model_and_keeps_the_id(hub):
    hub.add(adapter("x"))
    hub.add(adapter("nameless", 1, base_model=""))
    record = hub.bind("x", model(name="/models/base", commit=COMMIT))
    assert (record.base_model, record.base_revision, record.fingerprint) == ("org/base", COMMIT, fingerprint(model()))
    assert hub.record("x") == record
    assert hub["x"].fingerprint == fingerprint(model())
    assert hub.bind("nameless", model()).base == lw.base_key(model())
    assert hub.bind("x", model(commit=COMMIT)) == record
    assert record.version == 1


def test_an_adapter_is_not_bound_to_a_model_that_it_was_not_made_for(hub):
    hub.add(adapter("known", 0, fingerprint=fingerprint(model(0))))
    hub.add(adapter("wide", 1))
    hub.add(adapter("lost", 2, layer="decoder"))
    hub.add(adapter("dated", 3, card={"peft": {"revision": COMMIT}}))
    generation = hub.generation
    with pytest.raises(BaseModelMismatch, match=r"'known'.*'org/base'.*'org/twin'.*sampled weights differ"):
        hub.bind("known", model(1, name="org/twin"))
    with pytest.raises(LayerMismatch, match=r"layer '0' with shape \(3, 5\), but that of the model 'org/base' is \(3, 6\)"):
        hub.bind("wide", model(sizes=(6, 3)))
    with pytest.raises(LayerMismatch, match="'decoder', which the model does not have"):
        hub.bind("lost", model())
    with pytest.raises(BaseModelMismatch, match=f"{COMMIT}.*{OTHER_COMMIT}"):
        hub.bind("dated", model(commit=OTHER_COMMIT))
    assert hub.generation == generation
