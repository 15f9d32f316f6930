"""Statistics of many adapters: those of each alone, wherever they are collected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.errors import AdapterNotFound, InvalidTask, UnknownExpert
from loraweave.extensions.statistics import collect_statistics, pool_statistics

ROWS = {
    "a": ["a dog", "two birds sing", "x", "Once upon a time", "a dog"],
    "b": [("one", "two"), ("a", "b")],
}
OPTIONS = {"batch_size": 2, "max_tokens": 6, "seed": 3, "layers": ["model.layers.0.mlp.up_proj"], "progress": False}


@pytest.fixture(scope="module")
def adapters(base, make_adapter):
    made = {name: make_adapter(base[0], name, seed=seed) for seed, name in enumerate("ab")}
    return {name: replace(adapter, base_model=base[0].name_or_path) for name, adapter in made.items()}


@pytest.fixture
def hub(adapters, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        hub.add_many(list(adapters.values()))
        yield hub


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, one in found.items():
        other = expected[name]
        assert one.adapter_hash == other.adapter_hash
        assert one.layers.keys() == other.layers.keys()
        for layer, seen in one.layers.items():
            known = other.layers[layer]
            assert (seen.num_tokens, seen.fisher_norm) == (known.num_tokens, known.fisher_norm)
            assert torch.equal(seen.gram_II, known.gram_II)
            assert torch.equal(seen.fisher_OI, known.fisher_OI)


@pytest.mark.usefixtures("warm_workers")
def test_on_two_workers_they_have_the_bits_of_each_adapter_alone(base, adapters, hub):
    alone = {name: collect_statistics(*base, adapters[name], rows, **OPTIONS) for name, rows in ROWS.items()}
    assert_same(pool_statistics(*base, hub, ROWS, n_jobs=2, **OPTIONS), alone)


def test_of_a_pool_only_those_with_texts_are_asked_for(base, adapters):
    found = pool_statistics(*base, adapters, {name: ROWS[name] for name in "ba"}, what="gram", **OPTIONS)
    assert list(found) == ["b", "a"]
    assert all(seen.fisher_OI is None for each in found.values() for seen in each.layers.values())
    merged = lw.merge([adapters["b"], adapters["a"]], method="regmean", statistics=list(found.values()), progress=False)
    assert merged.layers.keys() == adapters["a"].layers.keys()


def test_rows_of_every_form_are_read_as_for_one_adapter(base, adapters):
    rows = {"a": [{"input": text} for text in ROWS["a"]], "b": [{"prompt": p, "completion": c} for p, c in ROWS["b"]]}
    alone = {name: collect_statistics(*base, adapters[name], given, **OPTIONS) for name, given in rows.items()}
    assert_same(pool_statistics(*base, adapters, {name: iter(given) for name, given in rows.items()}, **OPTIONS), alone)


def test_names_and_texts_that_are_not_there_are_refused_before_anything_runs(base, adapters, hub):
    ran = []
    handle = base[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(UnknownExpert, match="'d'"):
        pool_statistics(*base, adapters, {"a": ["x"], "d": ["x"]}, **OPTIONS)
    with pytest.raises(AdapterNotFound, match="d"):
        pool_statistics(*base, hub, {"a": ["x"], "d": ["x"]}, **OPTIONS)
    for wrong in ({}, ["a text"], None):
        with pytest.raises(InvalidTask, match=r"give \{name of an adapter: its texts\}"):
            pool_statistics(*base, adapters, wrong, **OPTIONS)
    with pytest.raises(InvalidTask, match="of 'b'"):
        pool_statistics(*base, adapters, {"a": ["x"], "b": "x"}, **OPTIONS)
    handle.remove()
    assert ran == []


def test_a_failure_names_its_adapter(base, adapters):
    with pytest.raises(InvalidTask, match="text 1") as raised:
        pool_statistics(*base, adapters, {"a": ["x"], "b": [""]}, **OPTIONS)
    assert raised.value.__notes__ == ["this was piece 'b' of 2; the same call runs what failed again"]
