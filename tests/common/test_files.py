import os

import pytest

from loraweave.common.files import whole_file


def test_a_whole_file_takes_the_place_of_the_old_one_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "x"
    target.write_bytes(b"old")
    with whole_file(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert (target.read_bytes(), list(tmp_path.iterdir())) == (b"new", [target])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_after_an_error_the_old_file_stands_alone(tmp_path, monkeypatch, call):
    target = tmp_path / "x"
    target.write_bytes(b"old")

    def full(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="full"), whole_file(target) as temporary:
        temporary.write_bytes(b"new")
    assert (target.read_bytes(), list(tmp_path.iterdir())) == (b"old", [target])


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    with whole_file(tmp_path / "x") as temporary:
        temporary.write_bytes(b"new")
    assert calls == ["fsync", "replace", "fsync"]
