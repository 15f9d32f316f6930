"""The page on pipelines of images: its code runs."""

import pytest

pytest.importorskip("diffusers")


def test_the_code_of_the_page_runs(run_page):
    assert run_page("docs/extensions/diffusion.md")["zipped"].name == "fox+ink"
