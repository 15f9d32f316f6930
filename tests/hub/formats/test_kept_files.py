"""Files beside an adapter's weights: kept byte for byte by reading, saving, exporting and the hub, or named."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import tiny_hubs
import torch
from installed import rebuild
from safetensors.torch import load, save

from loraweave.errors import AdapterCorrupt, AdapterExists, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats import _files
from loraweave.hub.hub import Hub

FILES = {
    "added_tokens.json": json.dumps({"<tool>": 99}).encode(),
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
    "tokenizer.json": json.dumps({"version": "1.0", "model": {"vocab": {"a": 0}}}).encode(),
    "tokenizer_config.json": json.dumps({"added_tokens_decoder": {"99": {"content": "<tool>"}}}).encode(),
    "value_head.safetensors": save({"v_head.summary.weight": torch.arange(8.0).reshape(1, 8)}),
}


def adapter(seed=0, name="a", **parts):
    return tiny_hubs.adapter(seed, name, layers=["model.layers.0.q_proj"], **parts)


@pytest.fixture
def folder(tmp_path):
    path = adapter().save_pretrained(tmp_path / "reward")
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    return path


def blobs(hub):
    return {path.stem for path in (hub.path / "blobs").glob("*/*")}


def test_what_lies_beside_the_weights_is_read_and_is_not_in_the_hash(folder):
    read = Adapter.from_pretrained(folder)
    assert dict(read.files) == FILES
    assert load(read.files["value_head.safetensors"])["v_head.summary.weight"].tolist() == [list(range(8))]
    assert read.hash == adapter().hash
    assert dict(pickle.loads(pickle.dumps(read)).files) == FILES


def test_adapters_with_one_tokenizer_hold_it_once(folder):
    one, two = Adapter.from_pretrained(folder), Adapter.from_pretrained(folder)
    assert one.files["tokenizer.json"] is two.files["tokenizer.json"]


def test_saving_and_exporting_write_them_back(folder, tmp_path):
    read = Adapter.from_pretrained(folder)
    report = read.export(tmp_path / "export")
    for written in (tmp_path / "export", read.save_pretrained(tmp_path / "saved")):
        assert {name: (written / name).read_bytes() for name in FILES} == FILES
        assert "tokenizer_config.json" in (written / "README.md").read_text()
    assert any("value_head.safetensors" in text for text in report.warnings)
    # again over what was written
    assert dict(Adapter.from_pretrained(read.save_pretrained(tmp_path / "saved")).files) == FILES


def test_saving_over_files_of_another_adapter_is_refused(folder):
    with pytest.raises(AdapterExists, match=r"5 entries that are not part of an adapter \(added_tokens\.json"):
        adapter().save_pretrained(folder)


def test_a_hub_gives_them_back_and_stores_each_once(folder, hub, tmp_path):
    hub.add(folder, name="one")
    hub.add(Adapter.from_pretrained(folder), name="two")
    hub.add_many([dataclasses.replace(adapter(1), name="three", files={"tokenizer.json": FILES["tokenizer.json"]})])
    assert len(blobs(hub)) == len(FILES) + 2
    with Hub(hub.path) as again:
        assert dict(again["one"].files) == dict(again["two"].files) == FILES
        assert dict(again["three"].files) == {"tokenizer.json": FILES["tokenizer.json"]}
        assert "kept_files" not in again["one"].card
        assert again.verify().ok
        assert again.verify().orphans == ()
    exported = hub["one"].save_pretrained(tmp_path / "out")
    assert {name: (exported / name).read_bytes() for name in FILES} == FILES


def test_gc_keeps_what_some_version_has_and_deletes_the_rest(folder, hub):
    hub.add(folder, name="a")
    hub.add(adapter(1), name="a", replace=True)
    hub.gc()
    assert dict(hub.get("a", version=1).files) == FILES
    hub.prune("a")
    hub.gc()
    assert blobs(hub) == {hub.record("a").hash}
    assert dict(hub["a"].files) == {}


def test_a_rebuilt_catalogue_has_them(folder, hub):
    hub.add(folder, name="a")
    hub.close()
    (hub.path / "catalogue.sqlite").unlink()
    assert rebuild(hub.path) == ["a"]
    with Hub(hub.path) as again:
        assert dict(again["a"].files) == FILES


def test_a_missing_or_damaged_file_is_found_by_verify_named_on_reading_and_mended_by_adding_again(folder, hub):
    hub.add(folder, name="a")
    digest = Adapter.from_pretrained(folder).files.files["tokenizer.json"].sha256
    path = hub.path / "blobs" / digest[:2] / f"{digest}.safetensors"
    for spoil in (path.unlink, lambda: (path.chmod(0o644), path.write_bytes(b"other"))):
        spoil()
        assert [problem for problem in hub.verify().problems if problem.startswith("tokenizer.json of adapter 'a'")]
        with pytest.raises(AdapterCorrupt, match=f"adapter 'a'.*{digest}"):
            hub["a"].files["tokenizer.json"]
        hub.add(folder, name="a")
        assert hub.verify().ok


def test_adding_content_again_notes_files_it_came_without_and_says_which_it_does_not_take(folder, hub):
    hub.add(adapter())
    assert dict(hub["a"].files) == {}
    hub.add(folder, name="a")
    assert dict(hub["a"].files) == FILES
    with pytest.warns(UserWarning, match=r"'a' is stored already, with other files beside it \(added_tokens\.json"):
        hub.add(adapter(files={"tokenizer.json": b"{}"}))
    assert dict(hub["a"].files) == FILES


def test_a_file_that_cannot_be_kept_is_named_and_the_rest_is_read(folder, monkeypatch):
    (folder / "value_head.safetensors").unlink()
    (folder / "value_head.bin").write_bytes(b"a pickle")
    (folder / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.setattr(_files, "MAX_KEPT_BYTES", 50)
    with pytest.warns(UserWarning, match="left out") as caught:
        read = Adapter.from_pretrained(folder)
    left_out = ("tokenizer.json", "tokenizer_config.json", "value_head.bin")
    assert [name in str(one.message) for name, one in zip(left_out, caught, strict=True)] == [True] * 3
    assert sorted(read.files) == ["added_tokens.json", "chat_template.jinja"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../x": b""}, r"'\.\./x' with bytes is not a file"),
        ({"tokenizer.json": "{}"}, "'tokenizer.json' with str is not a file"),
    ],
)
def test_other_names_and_texts_are_refused(files, message):
    with pytest.raises(AdapterUnsupported, match=message):
        adapter(files=files)
