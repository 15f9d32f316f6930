"""Where an adapter came from: folder or repository and commit, the parents of a merge, recipe and scores; never a token."""

import json

import pytest
import tiny_hubs

import loraweave as lw
from loraweave.hub import sources as model_hub
from loraweave.hub.hub import Hub
from loraweave.hub.sources import without_secrets
from loraweave.types import Source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def adapter(name, seed=0, **fields):
    return tiny_hubs.adapter(seed, name, layers=["model.q_proj"], **fields)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """owner/name, as a snapshot of the model hub's cache."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    adapter("x").save_pretrained(snapshot)
    monkeypatch.setattr(model_hub, "snapshot_download", lambda *args, **kwargs: str(snapshot))
    return snapshot


def test_a_folder_is_recorded_as_it_was_named(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter("x").save_pretrained("given")
    assert hub.add("given").source == Source("given")
    # nothing of it travels with the adapter
    hub["x"].save_pretrained("out")
    assert "given" not in (tmp_path / "out" / "loraweave.json").read_text()


def test_a_repository_is_recorded_with_the_commit_that_was_read(hub, repository, tmp_path):
    assert hub.add("owner/name", name="x").source == Source("owner/name", COMMIT)
    # and stays known when the adapter goes through a folder, or through the caller's hands
    hub["x"].save_pretrained(tmp_path / "out")
    read = lw.Adapter.from_pretrained(tmp_path / "out")
    assert hub.add(read, name="y").source == Source("owner/name", COMMIT)
    assert hub.add(lw.Adapter.from_pretrained("owner/name"), name="z").source == Source("owner/name", COMMIT)
    assert hub.add(str(tmp_path / "out"), name="w").source == Source(str(tmp_path / "out"))


def test_an_adapter_made_here_has_no_source(hub):
    assert hub.add(adapter("x")).source is None
    assert hub.add(adapter("y", card={"source": ["odd"]})).source is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://me:hf_secret@example.org/a/b.zip?token=hf_secret#x", "https://example.org/a/b.zip"),
        ("s3://bucket/folder", "s3://bucket/folder"),
        ("owner/name", "owner/name"),
        ("a@b/c?d", "a@b/c?d"),
    ],
)
def test_an_address_loses_what_may_be_a_token(given, kept):
    assert without_secrets(given) == kept


def test_a_token_is_nowhere_in_the_hub(hub, repository, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add(lw.Adapter.from_pretrained("owner/name", token="hf_secret"), name="x")
    assert not [path for path in hub.path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_a_merge_knows_its_parents_recipe_and_scores(hub):
    parents = [adapter("a", 1), adapter("b", 2)]
    merged = lw.merge(parents, [0.5, 0.25], name="m")
    record = hub.add(lw.Adapter("m", "org/base", merged.layers, card={**merged.card, "scores": {"em": 0.5}}))
    assert set(record.parents) == {parent.hash for parent in parents}
    assert record.card["recipe"]["method"] == "linear"
    assert record.card["scores"] == {"em": 0.5}
    assert hub.add(parents[0]).parents == ()


@pytest.mark.parametrize("recipe", [None, "words", {"parents": 3}, {"parents": [3, {"name": "x"}]}])
def test_a_recipe_of_another_form_has_no_parents(hub, recipe):
    assert hub.add(adapter("x", card={"recipe": recipe})).parents == ()


def test_provenance_survives_a_new_catalogue(hub, repository):
    hub.add("owner/name", name="x")
    hub.close()
    (hub.path / "catalogue.sqlite").unlink()
    from installed import rebuild

    rebuild(hub.path)
    with Hub(hub.path) as again:
        assert again.record("x").source == Source("owner/name", COMMIT)
        assert json.loads(json.dumps(dict(again.record("x").card)))["source"]["revision"] == COMMIT
