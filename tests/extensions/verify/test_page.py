from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_page_on_verifying_names_its_mistake(run_page):
    report = run_page("docs/extensions/verify.md")["report"]
    assert {str(fault) for fault in report.faults} == {f"asked negation, {when}: got passive" for when in ("alone", "mixed")}
