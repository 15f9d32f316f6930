"""What a hub writes of content that it has already."""

from __future__ import annotations

import pytest
from tiny_hubs import adapter, run_sql

from loraweave.hub.hub import Hub


@pytest.mark.parametrize("damage", ["DELETE FROM blobs", "UPDATE blobs SET size_bytes = 1"])
def test_adding_an_adapter_under_another_name_repairs_the_row_of_its_blob(tmp_path, damage):
    with Hub(tmp_path / "hub") as hub:
        stored = hub.add(adapter(1))
        files = sorted((tmp_path / "hub").glob("blobs/*/*"))
        run_sql(tmp_path / "hub", damage)
        assert not hub.verify().ok
        assert hub.add(adapter(1), name="twin").hash == stored.hash
        assert hub.verify().ok
        assert hub["adapter 1"].hash == hub["twin"].hash == adapter(1).hash
        assert sorted((tmp_path / "hub").glob("blobs/*/*")) == files


def test_content_that_is_written_anew_has_the_digest_of_its_new_file(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        hub.add(adapter(1), description="first")
        (path,) = (tmp_path / "hub").glob("blobs/*/*")
        before = path.read_bytes()
        path.unlink()
        hub.add(adapter(1), description="second")
        # with the factors goes what was said of them
        assert path.read_bytes() != before
        assert hub.verify().ok
        assert hub["adapter 1"].hash == adapter(1).hash
