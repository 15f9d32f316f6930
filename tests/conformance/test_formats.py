"""What every format of hub/formats must do: give back what it was given, and refuse what it does not recognise."""

from __future__ import annotations

import contextlib
import json
import os
from functools import partial

import pytest
import torch
from properties import Properties
from safetensors.torch import save_file

from loraweave import registry
from loraweave.errors import AdapterExists, AdapterUnsupported, HubError
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._contents import Contents
from loraweave.types import Factors

FORMATS = {name: registry.get("formats", name) for name in registry.names("formats")}
# types that PEFT trains and we only read: what was read of them is written as an ordinary LoRA
FILES = {name: layout for name, layout in FORMATS.items() if hasattr(layout, "knows")}
FOREIGN = {name: layout for name, layout in FORMATS.items() if hasattr(layout, "parts")}


WRITTEN = [name for name, layout in FORMATS.items() if hasattr(layout, "write")]
PROPERTIES = Properties(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_keeps_all_properties(name, request):
    PROPERTIES.walk(request, name, layout=FORMATS[name], written=FORMATS[name])


def contents(seed=0, *, ternary=True):
    """Two layers; ternary ones have values -c, 0 and c only, which every format can hold."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        values = torch.randn(*shape, generator=generator)
        return 0.25 * (1 + seed) * torch.where(values.abs() > 0.4, values.sign(), 0.0) if ternary else values

    layers = {
        "model.layers.0.q": Factors(matrix(3, 5), matrix(7, 3)),
        "model.layers.1.q": Factors(matrix(1, 5), matrix(7, 1)),
    }
    return Contents("base", layers, card={"description": "sorts", "tags": ["words"]})


def hash_of(given):
    return Adapter("a", "base", given.layers).hash


@PROPERTIES.add(of=WRITTEN)
def values_of_any_kind_come_back_exactly_or_are_refused(written, tmp_path):
    given = contents(ternary=False)
    folder = tmp_path / "adapter"
    with contextlib.suppress(HubError):
        written.write(given, folder)
    assert not folder.exists() or hash_of(written.read(folder)) == hash_of(given)


@PROPERTIES.add(of=WRITTEN)
def reading_gives_back_what_was_written(written, tmp_path):
    given = contents()
    folder = written.write(given, tmp_path / "adapter")
    assert written.recognises(folder)
    found = written.read(folder)
    assert hash_of(found) == hash_of(given)
    assert found.base_model == given.base_model
    assert found.card["description"] == "sorts"


@PROPERTIES.add(of=WRITTEN)
def every_tensor_of_the_files_matters(written, tmp_path):
    first, second = (written.read(written.write(contents(seed), tmp_path / str(seed))) for seed in (1, 2))
    assert hash_of(first) != hash_of(second)


@PROPERTIES.add(of=WRITTEN)
def an_adapter_of_any_written_format_is_read_without_naming_it(written, tmp_path):
    folder = written.write(contents(), tmp_path / "adapter")
    assert Adapter.from_pretrained(folder).hash == hash_of(written.read(folder))


@PROPERTIES.add(of=WRITTEN)
def an_empty_folder_missing_parents_and_an_older_adapter_give_way(written, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b", tmp_path / "empty"):
        written.write(contents(1), folder)
        assert hash_of(written.read(written.write(contents(2), folder))) == hash_of(contents(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


@PROPERTIES.add(of=WRITTEN)
def a_folder_with_other_files_and_a_file_are_left_alone(written, tmp_path):
    folder = written.write(contents(), tmp_path / "adapter")
    (folder / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    for target, named in ((folder, r"thesis\.txt"), (tmp_path / "file", "is a file")):
        with pytest.raises(AdapterExists, match=named):
            written.write(contents(1), target)
    assert hash_of(written.read(folder)) == hash_of(contents())


@PROPERTIES.add(of=WRITTEN)
def a_failure_while_writing_leaves_the_older_adapter_and_nothing_else(written, tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    folder = written.write(contents(), tmp_path / "adapter")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written.write(contents(1), folder)
    assert hash_of(written.read(folder)) == hash_of(contents())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


ZEROS = {"q": Factors(torch.zeros(1, 4), torch.zeros(3, 1))}
UNWRITTEN = {
    "NaN on the card": (Contents("base", contents().layers, card={"x": float("nan")}), "not JSON"),
    "an object on the card": (Contents("base", contents().layers, card={"x": object()}), "not JSON"),
    "no effect": (Contents("base", ZEROS), "without effect"),
}


@PROPERTIES.add(of=WRITTEN, case=UNWRITTEN)
def what_cannot_be_written_is_refused_and_nothing_appears(written, tmp_path, case):
    given, named = UNWRITTEN[case]
    with pytest.raises(AdapterUnsupported, match=named):
        written.write(given, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


# there may be none, since they are an extension's
def of_foreign(but=None):
    of = [name for name, layout in FOREIGN.items() if layout.peft_type != but]
    return PROPERTIES.add(of=of) if of else lambda function: function


@PROPERTIES.add()
def a_folder_of_something_else_is_not_recognised_and_refused_by_name(layout, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    assert not layout.recognises(tmp_path)
    with pytest.raises(HubError, match=r"notes\.txt"):
        layout.read(tmp_path)


@of_foreign()
def a_type_is_recognised_by_its_own_name_alone(name, tmp_path):
    others = [found for found in FOREIGN.values() if found.peft_type != FOREIGN[name].peft_type]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": FOREIGN[name].peft_type}))
    assert not any(other.recognises(tmp_path) for other in others)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ')
    assert not FOREIGN[name].recognises(tmp_path)


# the fields of LoRA are those of formats/peft.py
@of_foreign(but="LORA")
def every_field_of_a_types_config_is_known_or_refused(name):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = FOREIGN[name]
    tables = (found.fields, set(found.refused))
    assert sum(map(len, tables)) == len(set().union(*tables))
    fields = set(PEFT_TYPE_TO_CONFIG_MAPPING[found.peft_type].__dataclass_fields__)
    assert set().union(*tables) <= fields


# there may be none, since they are an extension's
of_files = partial(PROPERTIES.add, of=FILES) if FILES else lambda **_: lambda function: function


@of_files()
def a_file_is_known_by_the_names_in_it_and_by_one_layout_alone(name):
    assert [other for other, found in FILES.items() if found.knows(FILES[name].example)] == [name]
    parts = [FILES[name].split(tensor) for tensor in FILES[name].example]
    assert parts[0][0] == parts[1][0]
    assert [part for _, part in parts] == ["down", "up"]


@of_files(spoiled=["NaN", "nothing", "an unknown tensor", "a cut"])
def a_spoiled_file_is_refused_by_name(name, spoiled, tmp_path):
    down, up = FILES[name].example
    held = {down: torch.ones(5, 5), up: torch.ones(5, 5)}
    if spoiled == "an unknown tensor":
        held["what.is.this"] = torch.ones(2)
    else:
        held[up] = {"NaN": torch.full((5, 5), float("nan")), "nothing": torch.ones(0, 5), "a cut": torch.ones(5, 5)}[spoiled]
    path = tmp_path / "adapters.safetensors"
    save_file(held, path)
    if spoiled == "a cut":
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(HubError, match=r"adapters\.safetensors|what\.is\.this"):
        FILES[name].read(path)
