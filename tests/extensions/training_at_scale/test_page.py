"""The page of the extension."""

import pytest


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/training_at_scale.md")
    assert names["less"].estimated_bytes < names["report"].estimated_bytes
