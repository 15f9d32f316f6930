import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from installed import rebuild
from tiny_hubs import adapter

import loraweave.common.names
import loraweave.hub.stores.catalogue
from loraweave.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    AdapterSuspicious,
    AdapterUnsupported,
    DimensionMismatch,
    HubCorrupt,
    HubError,
    InvalidName,
    InvalidTask,
)
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.types import Factors, Fingerprint

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")


def files(hub):
    return {path.relative_to(hub.path): path.read_bytes() for path in hub.path.glob("blobs/*/*")}


def test_what_was_added_comes_back_whole(hub):
    given = adapter(0, fingerprint=Fingerprint("abc", (0.5, -1.25)), card={"recipe": {"steps": 3}, "tags": ["qa"]})
    hub.add(given)
    found = hub[given.name]
    assert (found.name, found.base_model, found.hash) == (given.name, given.base_model, given.hash)
    assert found.fingerprint == given.fingerprint
    assert dict(found.card) == {"recipe": {"steps": 3}, "tags": ["qa"]}


def test_the_record_says_what_the_adapter_is(hub):
    given = adapter(0, layers=LAYERS)
    record = hub.add(given, description="says hi", examples=["hello"], tags=["greeting", "greeting"], license="MIT")
    assert record.target_modules == ("q_proj", "up_proj")
    assert (record.rank, record.license, record.tags) == (2, "MIT", ("greeting",))
    assert (record.description, record.examples) == ("says hi", ("hello",))
    assert record.hash == given.hash
    assert record.size_bytes == sum(map(len, files(hub).values()))
    assert datetime.fromisoformat(record.created).tzinfo is not None


def test_fields_come_from_the_card_unless_they_are_given(hub):
    card = {"description": "card", "examples": ["e"], "tags": ["t"], "license": "mit", "scores": [1.5]}
    record = hub.add(adapter(0, card=card), description="given", base_model="org/other")
    assert (record.description, record.examples, record.tags, record.license) == ("given", ("e",), ("t",), "MIT")
    assert record.base_model == hub["adapter 0"].base_model == "org/other"
    assert record.card == {**card, "description": "given", "license": "MIT"}


def test_a_card_of_read_only_mappings_and_tuples_is_stored_as_json(hub):
    card = MappingProxyType({"recipe": MappingProxyType({"betas": (0.5, 0.25)})})
    assert hub.add(adapter(0, card=card)).card == {"recipe": {"betas": [0.5, 0.25]}}


def test_records_come_in_order_of_addition_whatever_the_clock_says(hub, monkeypatch):
    years = itertools.count(2100, -10)

    class Backwards(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(next(years), 1, 1, tzinfo=tz)

    monkeypatch.setattr(loraweave.common.names, "datetime", Backwards)
    for seed in (3, 1, 2):
        hub.add(adapter(seed))
    assert [record.name for record in hub] == ["adapter 3", "adapter 1", "adapter 2"]
    assert len(hub) == 3


def test_a_number_in_the_order_is_never_used_again(hub):
    for seed in (0, 1):
        hub.add(adapter(seed))
    hub.remove("adapter 1")
    hub.add(adapter(1))
    hub.remove("adapter 0")
    hub.add(adapter(0))
    assert [record.name for record in hub] == ["adapter 1", "adapter 0"]


@pytest.mark.parametrize("name", ["../x", "a/b", "model.layers.0", "🦜 'n' \"q\" 100%", "; DROP TABLE adapters", "*", "%"])
def test_a_name_is_text_and_never_a_path(hub, name):
    hub.add(adapter(0), name=name)
    assert name in hub
    assert hub[name].name == name
    hub.remove(name)
    assert name not in hub
    assert {path.name for path in hub.path.parent.iterdir()} == {"hub"}


def test_names_differ_by_case_but_not_by_unicode_form(hub):
    hub.add(adapter(0), name="Qa")
    hub.add(adapter(1), name="qa")
    hub.add(adapter(2), name="cafe\u0301")
    assert hub["caf\u00e9"].hash == adapter(2).hash
    assert [hub["Qa"].hash, hub["qa"].hash] == [adapter(0).hash, adapter(1).hash]


@pytest.mark.parametrize("name", ["", " x", "a\0b", "\ud800", "x" * 201])
def test_a_name_that_cannot_be_stored_is_not_in_the_hub_and_not_added(hub, name):
    with pytest.raises(InvalidName):
        hub.add(adapter(0), name=name)
    assert name not in hub
    with pytest.raises(AdapterNotFound):
        hub[name]


def test_a_missing_name_is_a_key_error_that_names_near_misses(hub):
    hub.add(adapter(0), name="Sentiment")
    with pytest.raises(KeyError, match=r"no adapter 'sentimant'.*did you mean 'Sentiment'"):
        hub["sentimant"]
    for act in (hub.record, hub.remove, hub.update, hub.similar):
        with pytest.raises(AdapterNotFound, match=r"no adapter 'zzz'.*1 adapters"):
            act("zzz")


def bad(part, value):
    good = adapter(0).layers["layer"]
    return Adapter("bad", "org/base", {"fine": good, "layer.7": dataclasses.replace(good, **{part: value})})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (bad("a_RI", torch.full((2, 5), torch.nan)), AdapterCorrupt, "'bad', layer 'layer.7', a_RI: 10 of 10.*nan"),
        (bad("b_OR", torch.full((3, 2), -torch.inf)), AdapterCorrupt, "b_OR: 6 of 6.*-inf"),
        (bad("b_OR", torch.full((3, 2), 1e300, dtype=torch.float64)), AdapterCorrupt, "not finite in fp32"),
        (bad("b_OR", torch.full((3, 2), 3e38)), AdapterSuspicious, "'bad', layer 'layer.7': the product of its factors"),
        (bad("bias_O", torch.full((3,), torch.nan)), AdapterCorrupt, "bias_O"),
        (bad("bias_O", torch.ones(4)), AdapterCorrupt, r"bias_O has shape \(4,\), but the layer has 3 outputs"),
        (bad("b_OR", torch.ones(3, 4)), AdapterCorrupt, r"a_RI has shape \(2, 5\) and b_OR \(3, 4\)"),
        (bad("a_RI", torch.ones(2)), AdapterCorrupt, r"shape \(2,\)"),
        (bad("a_RI", torch.ones(2, 5, dtype=torch.int8)), AdapterUnsupported, "dtype torch.int8"),
        (
            Adapter("nil", "org/base", {"l": Factors(torch.ones(2, 5), torch.zeros(3, 2))}),
            AdapterUnsupported,
            "'nil' is without effect",
        ),
        (adapter(0, card={"score": float("nan")}), AdapterUnsupported, "cannot be stored as JSON"),
        (adapter(0, card={"thing": torch.ones(1)}), AdapterUnsupported, "cannot be stored as JSON"),
        (adapter(0, card={"x": "y" * 4_000_000}), AdapterUnsupported, "card.*limit is 4,000,000"),
        (adapter(0, card={"license": ["mit"]}), AdapterUnsupported, "license.*must be text, not list"),
        (adapter(0, base_model="b" * 1001), AdapterUnsupported, "base_model.*1,001 bytes; the limit is 1,000"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(hub, given, error, message):
    with pytest.raises(error, match=message):
        hub.add(given)
    assert len(hub) == 0
    assert not (hub.path / "blobs").exists()
    assert not (hub.path / "tmp").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"description": "é" * 50_001}, "description.*100,002 bytes; the limit is 100,000"),
        ({"examples": ["x"] * 1001}, "1,001 examples; the limit is 1,000"),
        ({"examples": ["ok", "x" * 10_001]}, r"examples\[1\].*10,001 bytes; the limit is 10,000"),
        ({"tags": {"a": 1}}, "tags.*must be a list of texts, not dict"),
        ({"description": 7}, "description.*must be text, not int"),
    ],
)
def test_fields_above_a_limit_are_refused_with_the_figure(hub, fields, message):
    with pytest.raises(AdapterUnsupported, match=message):
        hub.add(adapter(0), **fields)
    hub.add(adapter(0))
    with pytest.raises(AdapterUnsupported, match=message):
        hub.update("adapter 0", **fields)


def test_examples_that_are_no_texts_and_no_rows_are_refused_by_number(hub):
    hub.add(adapter(0))
    for examples, message in [([1], "example 1 of adapter 'adapter 0' is 1, not a text"), (3, "adapter 'adapter 0': got 3")]:
        with pytest.raises(InvalidTask, match=message):
            hub.add(adapter(0), examples=examples)
        with pytest.raises(InvalidTask, match=message):
            hub.update("adapter 0", examples=examples)


def test_any_text_of_a_description_comes_back(hub):
    text = "a\0b\ud800 ' \" <script> %s \n🦜"
    hub.add(adapter(0), description=text)
    assert hub.record("adapter 0").description == text


def test_a_single_text_is_one_tag_and_one_example(hub):
    record = hub.add(adapter(0), tags="qa", examples="hello")
    assert (record.tags, record.examples) == (("qa",), ("hello",))


def test_a_pool_has_the_named_adapters_in_the_order_given(hub):
    for seed in range(3):
        hub.add(adapter(seed))
    assert hub.pool().names == ("adapter 0", "adapter 1", "adapter 2")
    assert hub.pool(["adapter 2", "adapter 0"]).names == ("adapter 2", "adapter 0")
    with pytest.raises(AdapterNotFound, match="adapter 9"):
        hub.pool(["adapter 9"])


def test_update_replaces_what_is_given_and_clears_what_is_empty(hub):
    hub.add(adapter(0), description="old", examples=["e"], tags=["t"], license="MIT")
    hub.update("adapter 0", description="new", tags=())
    record = hub.record("adapter 0")
    assert (record.description, record.examples, record.tags, record.license) == ("new", ("e",), (), "MIT")
    assert hub.update("adapter 0", license="").license is None
    assert hub["adapter 0"].card == {"description": "new", "examples": ["e"]}


def test_rename_keeps_the_place_and_refuses_a_name_that_is_taken(hub):
    for seed in (0, 1):
        hub.add(adapter(seed))
    assert hub.rename("adapter 0", "zero").name == "zero"
    assert [record.name for record in hub] == ["zero", "adapter 1"]
    assert hub["zero"].hash == adapter(0).hash
    with pytest.raises(AdapterExists, match=r"'zero'.*'adapter 1' stands"):
        hub.rename("zero", "adapter 1")
    with pytest.raises(InvalidName):
        hub.rename("zero", "")
    assert hub.rename("zero", "zero").name == "zero"


def test_gc_sweeps_what_killed_writers_left(hub):
    hub.add(adapter(0))
    (hub.path / "tmp" / "half").write_bytes(b"1234")
    assert hub.gc() == 4


def test_opening_sweeps_what_a_writer_left_an_hour_ago(hub):
    (hub.path / "tmp").mkdir()
    for name, seconds_ago in (("old", 3700), ("new", 3500)):
        (hub.path / "tmp" / name).write_bytes(b"x")
        os.utime(hub.path / "tmp" / name, (time.time() - seconds_ago,) * 2)
    with Hub(hub.path):
        assert [path.name for path in (hub.path / "tmp").iterdir()] == ["new"]


def test_gc_deletes_nothing_while_a_row_is_missing(hub):
    hub.add(adapter(0))
    with hub._catalogue.writing("damaging") as connection:
        connection.execute("DELETE FROM adapters")
    with pytest.raises(HubCorrupt, match="0 adapters, but 1 were added; nothing was deleted"):
        hub.gc()
    assert len(files(hub)) == 1


@pytest.mark.parametrize("vector", [np.ones((2, 2)), np.ones(5), np.array([1, np.nan, 1]), np.ones(0), np.float32(1)])
def test_a_vector_that_cannot_be_searched_is_refused_and_none_is_stored(hub, vector):
    hub.add(adapter(0))
    with pytest.raises(DimensionMismatch, match="'adapter 0' from embedder 'e'"):
        hub.store_vectors("e", [("gone", "d", np.ones(3)), ("adapter 0", "d", vector)])
    assert hub.vectors("e") == {}


def test_no_hub_is_created_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loraweave.hub.stores.catalogue.os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="holds no hub"):
        Hub(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "hub").write_text("x")
    with pytest.raises(HubError, match="a hub is a folder"):
        Hub(tmp_path / "hub")


@pytest.mark.parametrize("folder", ["with space", "a?b", "a#b", "100%41", "ünï", "a'b"])
def test_any_folder_name_holds_a_hub(tmp_path, folder):
    with Hub(tmp_path / folder / "deeper") as hub:
        hub.add(adapter(0))
    with Hub(str(tmp_path / folder / "deeper")) as hub:
        assert hub["adapter 0"].hash == adapter(0).hash
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_the_log_is_moved_into_the_catalogue_once_it_is_large(hub, monkeypatch):
    monkeypatch.setattr(loraweave.hub.stores.catalogue, "CHECKPOINT_BYTES", 50_000)
    hub.add(adapter(0))
    log = hub.path / "catalogue.sqlite-wal"
    largest = 0
    for number in range(30):
        hub.update("adapter 0", description=f"{number}" * 10_000)
        largest = max(largest, log.stat().st_size)
    assert 50_000 < largest < 200_000


def test_gc_gives_the_space_of_the_log_back_unless_a_reader_needs_it(hub):
    hub.add(adapter(0))
    log = hub.path / "catalogue.sqlite-wal"
    with hub._catalogue.reading() as connection:
        connection.execute("SELECT * FROM state").fetchall()
        hub.update("adapter 0", description="x")
        hub.gc()
        assert log.stat().st_size > 0
    hub.gc()
    assert log.stat().st_size == 0
    assert hub.record("adapter 0").description == "x"


def test_listing_a_hub_imports_neither_torch_nor_numpy(hub):
    hub.add(adapter(0))
    program = (
        "import sys; from loraweave.hub.hub import Hub; hub = Hub(sys.argv[1]); names = [r.name for r in hub]; 'x' in hub; "
        "hub.gc(); import json; print(json.dumps([names, sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules))]))"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(hub.path)], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == [["adapter 0"], []]


def test_a_peft_folder_is_added_under_its_name(hub, tmp_path):
    folder = adapter(0, "saved", card={"description": "from a folder"}).save_pretrained(tmp_path / "saved")
    record = hub.add(folder)
    assert (record.name, record.description, record.hash) == ("saved", "from a folder", adapter(0).hash)
    assert hub.add(str(folder), name="other").name == "other"
    with pytest.raises(AdapterNotFound):
        hub.add(Path(tmp_path / "nowhere"))


def test_heads_are_stored_verified_and_rebuilt(hub):
    given = adapter(0, heads={"score.weight": torch.randn(2, 3)})
    hub.add(given)
    assert hub[given.name].hash == given.hash != adapter(0).hash
    assert torch.equal(hub[given.name].heads["score.weight"], given.heads["score.weight"])
    assert hub.verify().ok
    hub.close()
    (hub.path / "catalogue.sqlite").unlink()
    assert rebuild(hub.path) == [given.name]


def test_a_head_that_is_not_finite_is_refused(hub):
    with pytest.raises(AdapterCorrupt, match=r"head 'score\.weight'.*not finite"):
        hub.add(adapter(0, heads={"score.weight": torch.tensor([torch.nan])}))
    assert not files(hub)


def test_an_unknown_form_of_storing_is_refused_and_nothing_is_written(hub):
    with pytest.raises(AdapterUnsupported, match="not as 'zip'"):
        hub.add(adapter(0), stored_as="zip")
    assert len(hub) == 0
    assert not files(hub)


def test_a_hub_travels_as_its_address_which_a_process_opens_once(hub, monkeypatch):
    hub.add(adapter(1, "a"))
    monkeypatch.chdir(hub.path.parent)
    with Hub(hub.path.name) as relative:
        sent = pickle.dumps(relative)
    assert len(sent) < 500
    monkeypatch.chdir("/")
    arrived = pickle.loads(sent)
    assert arrived.path == hub.path
    assert arrived["a"].hash == hub["a"].hash
    assert pickle.loads(sent) is arrived
    arrived.close()
