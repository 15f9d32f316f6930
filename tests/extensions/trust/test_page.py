"""The page on trust: its code runs, and what is signed in the shell is signed."""

import shutil

import pytest

pytest.importorskip("cryptography")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/trust.md")
    assert names["report"].ok
    assert {len(numbers) for numbers in names["own"].values()} == {5}
