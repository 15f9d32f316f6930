"""`loraweave serve`, as a process that a client asks and an interruption ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import typer
from command_line import adapter, call, told_address

import loraweave as lw
from loraweave.cli import app


@pytest.fixture
def hub(here):
    with lw.Hub(here / "adapters") as opened:
        for seed, name in enumerate(("left", "right")):
            opened.add(adapter(name, seed))
    return here / "adapters"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_server_answers_for_a_formula_until_it_is_interrupted(hub, base, here, stop):
    words = [sys.executable, "-m", "loraweave", "serve", "--hub", hub, "--base", base, "--port", "0"]
    process = subprocess.Popen(
        [str(word) for word in words], cwd=here, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    try:
        address = told_address(process)
        body = {"model": "0.5*left + right", "prompt": "ab", "max_tokens": 3}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            told = json.load(answer)
        assert told["system_fingerprint"] == "0.5*left + right"
        assert told["usage"]["completion_tokens"] in (1, 2, 3)
    finally:
        process.send_signal(stop)
        rest = process.communicate(timeout=60)[1]
    assert "Traceback" not in rest
    assert process.returncode == 0


SLOW = """
import sys, time
from loraweave.cli import main
from loraweave.serving.names import Names

def make(self, wanted):
    print("making", file=sys.stderr, flush=True)
    time.sleep(90)

Names.make = make
main()
"""


def test_a_merge_that_has_begun_does_not_delay_the_end(hub, base, here):
    words = ["serve", "--hub", hub, "--base", base, "--port", "0", "--grace", "0"]
    command = [sys.executable, "-c", SLOW, *map(str, words)]
    environment = {**os.environ, "NO_COLOR": "1"}
    with subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True, env=environment) as process:
        asked = urllib.parse.urlsplit(told_address(process))
        body = json.dumps({"model": "ties(left, right)", "prompt": "ab", "max_tokens": 3})
        connection = http.client.HTTPConnection(asked.netloc, timeout=120)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert any(line == "making\n" for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        assert connection.getresponse().status == 503
        connection.close()
        assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 0


def test_an_empty_key_is_refused_as_a_variable_too(hub, base, monkeypatch):
    monkeypatch.setenv("LORAWEAVE_API_KEY", "")
    refused = call("serve", "--hub", hub, "--base", base)
    assert (refused.exit_code, "the key is empty" in refused.stderr) == (1, True)


def test_an_address_that_others_reach_needs_a_key_and_a_hub_has_to_be_there(hub, base, here):
    refused = call("serve", "--hub", hub, "--base", base, "--host", "0.0.0.0")
    assert (refused.exit_code, "give --api-key" in refused.stderr) == (1, True)
    missing = call("serve", "--hub", here / "none")
    assert (missing.exit_code, "no hub in" in missing.stderr) == (1, True)


def test_without_its_packages_the_error_has_the_command_that_installs_them(hub, here):
    code = "import sys; sys.modules['uvicorn'] = None; sys.argv[1:] = ['serve']; from loraweave.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, "pip install 'loraweave[serve]'" in done.stderr) == (1, True)


def test_every_option_is_explained_in_the_page():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    options = [option for each in typer.main.get_command(app).commands["serve"].params for option in each.opts]
    assert len(options) > 10
    assert [option for option in options if f"`{option}`" not in page and f"`--no-{option[2:]}`" not in page] == []
