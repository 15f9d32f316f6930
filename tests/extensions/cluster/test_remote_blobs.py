"""Blobs in a store that fsspec reaches: failures of the store, copies, and what they cost."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from typing import ClassVar

import pytest

import loraweave.hub.stores.folder_blobs
from loraweave.errors import AdapterCorrupt, HubError, HubReadOnly, PackageMissing
from loraweave.extensions.cluster.blobs.fsspec import Fsspec

fsspec = pytest.importorskip("fsspec")
memory = pytest.importorskip("fsspec.implementations.memory")

NUMBERS = itertools.count()
DATA = b"what an adapter weighs" * 1000
NAME = "ab" + "0" * 62
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def url():
    return f"memory://bucket-{next(NUMBERS)}"


@pytest.fixture
def blobs(url, tmp_path):
    return Fsspec(url, tmp_path / "copies")


@pytest.fixture
def share(monkeypatch):
    """A store that needs a rename; `fail` is what its next call of that name does instead."""

    class Share(memory.MemoryFileSystem):
        protocol = "shared"
        fail: ClassVar[dict] = {}

        def mv(self, *args, **kwargs):
            self.fail.pop("mv", lambda: None)()
            return super().mv(*args, **kwargs)

    fsspec.register_implementation("shared", Share, clobber=True)
    return Share


def test_a_blob_is_mapped_from_a_copy_that_is_fetched_once(blobs, monkeypatch):
    assert not blobs.has(NAME)
    assert blobs.put(NAME, DATA) == SHA256
    assert blobs.has(NAME)
    path = blobs.local(NAME, SHA256, "x")
    monkeypatch.setattr(blobs, "_store", None)
    assert blobs.local(NAME, SHA256, "x") == path
    assert path.read_bytes() == DATA


def test_a_damaged_copy_is_fetched_anew(blobs):
    blobs.put(NAME, DATA)
    path = blobs.local(NAME, SHA256, "x")
    path.chmod(0o644)
    path.write_bytes(DATA[:-1] + b"!")
    assert blobs.local(NAME, SHA256, "x").read_bytes() == DATA


@pytest.mark.parametrize("call", ["mkdir", "replace"])
def test_a_reader_keeps_its_copy_beside_gc_and_beside_other_readers(blobs, tmp_path, monkeypatch, call):
    blobs.put(NAME, DATA)
    shutil.rmtree(tmp_path / "copies")
    beside = Fsspec(blobs.url, tmp_path / "copies")
    waiting = [lambda: beside.local(NAME, SHA256, "y"), lambda: beside.sweep(0.0)]

    class Os:
        def __getattr__(self, name):
            while name == call and waiting:
                waiting.pop()()
            return getattr(os, name)

    monkeypatch.setattr(loraweave.hub.stores.folder_blobs, "os", Os())
    assert blobs.local(NAME, SHA256, "x").read_bytes() == DATA
    assert not waiting


def test_a_missing_blob_is_a_missing_file(blobs):
    with pytest.raises(FileNotFoundError):
        blobs.local(NAME, SHA256, "x")
    with pytest.raises(FileNotFoundError):
        blobs.require(NAME, SHA256, "x")


def test_what_the_store_changed_on_its_way_is_not_taken_for_stored(blobs, monkeypatch):
    real = memory.MemoryFileSystem.pipe_file
    monkeypatch.setattr(memory.MemoryFileSystem, "pipe_file", lambda self, path, data: real(self, path, b"other"))
    with pytest.raises(HubError, match="what the store gives back has the sha256"):
        blobs.put(NAME, DATA)


def test_a_store_that_grows_files_shows_a_blob_only_when_it_is_whole(share, tmp_path):
    blobs = Fsspec(f"shared://place-{next(NUMBERS)}", tmp_path)

    def interrupted():
        assert not blobs.has(NAME)
        assert list(blobs.names()) == []
        raise KeyboardInterrupt

    share.fail["mv"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        blobs.put(NAME, DATA)
    assert list(blobs.names()) == []
    # nothing is left to sweep
    assert blobs.sweep(0.0) == 0
    blobs.put(NAME, DATA)
    assert list(blobs.names()) == [NAME]


def test_what_a_killed_writer_left_is_swept_once_it_is_old(share, tmp_path):
    blobs = Fsspec(f"shared://place-{next(NUMBERS)}", tmp_path)
    store, root = blobs._store()
    store.pipe_file(f"{root}/tmp/left.safetensors", b"12345")
    assert blobs.sweep(3600.0) == 0
    assert blobs.sweep(0.0) == 5
    assert not store.exists(f"{root}/tmp/left.safetensors")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (PermissionError("403 for http://me:secret@host/x"), HubReadOnly),
        (TimeoutError("slow"), HubError),
        (RuntimeError("of a library at http://me:secret@host/x"), HubError),
        (FileNotFoundError("no bucket"), HubError),
    ],
)
def test_a_failing_store_is_named_without_credentials(blobs, monkeypatch, error, wanted):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(memory.MemoryFileSystem, "pipe_file", fail)
    with pytest.raises(wanted, match=r"^storing memory://bucket-") as found:
        blobs.put(NAME, DATA)
    assert type(found.value) is wanted
    assert "secret" not in str(found.value)
    assert not blobs.has(NAME)


def test_a_damaged_object_names_the_place_and_both_digests(blobs):
    blobs.put(NAME, DATA)
    blobs.copies.remove(NAME)
    store, root = blobs._store()
    store.pipe_file(f"{root}/blobs/ab/{NAME}.safetensors", b"else")
    with pytest.raises(AdapterCorrupt, match=rf"^x: blob memory://bucket.*{NAME}.*damaged.*not {SHA256}"):
        blobs.local(NAME, SHA256, "x")
    with pytest.raises(AdapterCorrupt, match=f"not {SHA256}"):
        blobs.require(NAME, SHA256, "x")


def test_a_scheme_without_a_package_says_what_to_install(tmp_path):
    with pytest.raises(HubError, match="bogus"):
        Fsspec("bogus://x", tmp_path)


def test_a_store_whose_package_is_missing_says_what_to_install(tmp_path, monkeypatch):
    def absent(*args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(PackageMissing, match=r"Install s3fs.*pip install 'loraweave\[remote\]'"):
        Fsspec("s3://bucket", tmp_path)


def test_a_bucket_that_does_not_exist_is_named(s3_server, tmp_path):
    blobs = Fsspec("s3://no-such-bucket/prefix", tmp_path)
    assert not blobs.has(NAME)
    assert list(blobs.names()) == []
    with pytest.raises(HubError, match=r"storing s3://no-such-bucket/prefix/blobs/.*no such bucket"):
        blobs.put(NAME, DATA)


def test_an_s3_server_that_is_gone_is_named(s3_server, tmp_path, monkeypatch):
    blobs = Fsspec("s3://bucket/prefix", tmp_path)
    import s3fs

    gone = s3fs.S3FileSystem(
        endpoint_url="http://127.0.0.1:1", config_kwargs={"retries": {"max_attempts": 1}}, skip_instance_cache=True
    )
    gone.retries = 1
    monkeypatch.setattr(blobs, "_store", lambda: (gone, "bucket/prefix"))
    with pytest.raises(HubError, match=r"fetching s3://bucket/prefix/blobs/.*Is the store reachable") as found:
        blobs.local(NAME, None, "x")
    assert "secret-of-the-store" not in str(found.value)
