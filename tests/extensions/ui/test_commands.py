"""`loraweave ui`, as a process that a browser asks and an interruption ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request

from command_line import adapter, call, told_address

import loraweave as lw


def test_the_page_is_there_at_the_address_that_is_printed_until_it_is_interrupted(here):
    with lw.Hub(here / "adapters") as hub:
        hub.add(adapter("left", 0))
    words = [sys.executable, "-m", "loraweave", "ui", "--port", "0"]
    environment = {**os.environ, "NO_COLOR": "1"}
    process = subprocess.Popen(words, cwd=here, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        address = told_address(process)
        with urllib.request.urlopen(f"{address}/", timeout=120) as answer:
            assert b"<title>loraweave</title>" in answer.read()
        with urllib.request.urlopen(f"{address}/api/adapters", timeout=120) as answer:
            assert [row["name"] for row in json.load(answer)["rows"]] == ["left"]
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    assert "Traceback" not in rest
    assert process.returncode in (0, 130)


def test_what_cannot_be_meant_is_said_before_the_server_starts(here):
    missing = call("ui", "--hub", here / "none")
    assert (missing.exit_code, "no hub in" in missing.stderr) == (1, True)
    wrong = call("ui", "--dtype", "float3")
    assert (wrong.exit_code, "--dtype takes float32" in wrong.stderr) == (2, True)


def test_the_code_of_the_page_runs(run_page):
    run_page("docs/extensions/ui.md")
