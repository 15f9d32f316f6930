from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_page_on_federation(run_page, tmp_path):
    assert run_page("docs/extensions/federated.md")["found"].client("server").rank == 8
    assert (tmp_path / "rounds").is_dir()
