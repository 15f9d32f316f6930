"""The page on trust: its code runs, and what is signed in the shell is signed."""

import shutil
from pathlib import Path

import pytest

from loraweave.extensions.trust.examiners import anomalies


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_code_of_the_page_runs(run_page):
    pytest.importorskip("cryptography")
    names = run_page("docs/extensions/trust.md")
    assert names["report"].ok


def test_the_page_on_anomalies_has_the_thresholds():
    page = (Path(__file__).parents[3] / "docs" / "anomalies.md").read_text(encoding="utf-8")
    assert f"beyond {anomalies.THRESHOLD} of them" in page
    assert f"Below {anomalies.MIN_REFERENCE} adapters" in page
