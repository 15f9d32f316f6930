"""Where an adapter is looked for. The model hub itself is in test_model_hub.py; here nothing is reachable."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from loraweave.errors import AdapterNotFound, AdapterUnsupported, SourceUnavailable
from loraweave.hub import sources as model_hub
from loraweave.hub.adapter import Adapter
from loraweave.hub.sources import open_source


def local_folder(source, **options):
    with open_source(source, **options) as opened:
        return opened.folder


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The calls that reach the model hub's client, which answers with a folder."""
    calls = []
    (tmp_path / "snapshot").mkdir()

    def download(repository, **keywords):
        calls.append((repository, keywords))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(model_hub, "snapshot_download", download)
    return calls


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_folder_is_itself_and_nobody_is_asked(tmp_path, asked, kind):
    assert local_folder(kind(tmp_path)) == tmp_path
    assert asked == []


def test_a_relative_folder_of_the_form_owner_name_is_the_folder(tmp_path, asked, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("owner/name").resolve() == (tmp_path / "owner" / "name").resolve()
    assert asked == []


def test_an_id_is_downloaded_with_revision_token_and_the_adapters_files_only(tmp_path, asked):
    (tmp_path / "snapshot" / "adapter_model.safetensors").touch()
    assert local_folder("owner/name", revision="v1", token="secret") == tmp_path / "snapshot"
    [(repository, keywords)] = asked
    assert repository == "owner/name"
    assert (keywords["revision"], keywords["token"], keywords["local_files_only"]) == ("v1", "secret", False)
    assert "adapter_config.json" in keywords["allow_patterns"]
    # never opened: a folder that has it is refused
    assert [pattern for pattern in keywords["allow_patterns"] if pattern.endswith(".bin")] == ["trainable_params.bin"]


def test_consent_asks_for_pickles_too_and_nothing_else_does(asked):
    for consent in (False, True):
        with pytest.raises(AdapterUnsupported, match=r"owner/name' .* has no weights .* allow_pickle=True"):
            Adapter.from_pretrained("owner/name", allow_pickle=consent)
    without, with_it = (set(keywords["allow_patterns"]) for _, keywords in asked)
    assert without < with_it
    assert "adapter_model.bin" in with_it - without


def test_a_file_of_a_repository_is_named_after_it_and_comes_alone(tmp_path, asked):
    file = tmp_path / "snapshot" / "styles" / "ink.safetensors"
    file.parent.mkdir()
    file.touch()
    assert local_folder("owner/name/styles/ink.safetensors") == file
    [(repository, keywords)] = asked
    assert (repository, keywords["allow_patterns"]) == ("owner/name", ["styles/ink.safetensors", "README.md"])


def test_a_file_that_the_repository_has_not_is_named(asked):
    with pytest.raises(AdapterNotFound, match=r"owner/name' .* no file 'other.safetensors'"):
        local_folder("owner/name/other.safetensors")


@pytest.mark.parametrize(
    "source",
    ["/no/such", "./no", "../no", "~/no", "one", "a/b/c", "", "https://host/a", "C:\\x", "a\nb", "a/b/../../c.safetensors"],
)
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(asked, source):
    with pytest.raises(AdapterNotFound, match="no folder"):
        local_folder(source)
    assert asked == []


def test_a_path_object_is_never_an_id(tmp_path, asked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterNotFound, match="no folder 'owner/name'"):
        local_folder((tmp_path / "owner" / "name").relative_to(tmp_path))
    assert asked == []


def test_a_file_is_no_folder(tmp_path, asked):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterNotFound, match="no folder"):
        local_folder(tmp_path / "file")


@pytest.mark.parametrize(
    "source", ["x" * 5000, f"{'x' * 3000}/y", "a\0b", "owner/na\0me", "owner/na me", "owner/🦙", "-/-", "a/.."]
)
def test_a_source_that_can_be_neither_folder_nor_id_is_a_named_error(source):
    with pytest.raises(AdapterNotFound):
        local_folder(source)


def test_offline_an_id_that_was_never_loaded_is_a_named_error_with_the_way_out():
    with pytest.raises(AdapterNotFound, match=r"'owner/name'.*download it first, or pass the path of a local folder"):
        local_folder("owner/name", revision="v1")


def test_the_cause_is_kept_on_one_line_and_the_revision_is_named(monkeypatch):
    def fail(*arguments, **keywords):
        raise LocalEntryNotFoundError("first line\nsecond line")

    monkeypatch.setattr(model_hub, "snapshot_download", fail)
    with pytest.raises(SourceUnavailable, match=r"revision 'v1'.*first line") as caught:
        local_folder("owner/name", revision="v1", token="secret")
    assert "second" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)
