"""The code of the page of quantised bases."""

import pytest


def test_the_code_of_the_page_runs(run_page):
    pytest.importorskip("bitsandbytes")
    run_page("docs/extensions/quantised.md")
