"""The files of adapters as blobs of a store; what users see of them is in tests/hub/formats/test_kept_files.py."""

from __future__ import annotations

import hashlib

import pytest

from loraweave.hub.stores.folder_blobs import FolderBlobs, file_bytes, put_files

FILES = {"merges.txt": b"first", "tokenizer.json": b"second", "vocab.json": b"third"}


@pytest.mark.parametrize("stored", FILES)
def test_files_beside_one_that_is_stored_already_are_stored_too(tmp_path, stored):
    blobs = FolderBlobs(tmp_path)
    put_files(blobs, {stored: FILES[stored]})
    put_files(blobs, FILES)
    digests = {name: hashlib.sha256(text).hexdigest() for name, text in FILES.items()}
    assert {name: file_bytes(blobs, digest, name) for name, digest in digests.items()} == FILES
