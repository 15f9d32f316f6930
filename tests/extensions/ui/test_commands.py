"""`loraweave ui`, as a process that a browser asks and an interruption ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from types import SimpleNamespace

import pytest
from command_line import adapter, call, told_address

import loraweave as lw
from loraweave.extensions.ui import commands


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


@pytest.mark.parametrize(
    ("options", "screen", "is_opened"), [([], True, True), ([], False, False), (["--no-open"], True, False)]
)
def test_the_address_is_opened_where_there_is_a_screen_unless_it_shall_not_be(here, monkeypatch, options, screen, is_opened):
    opened = threading.Event()
    monkeypatch.setattr(commands, "has_display", lambda: screen)
    monkeypatch.setattr("webbrowser.open", lambda address: address == "http://127.0.0.1:8001/" and opened.set())

    def make_ui_server(hub, load, *, ready, **options):
        return SimpleNamespace(run=lambda: ready("http://127.0.0.1:8001/"))

    monkeypatch.setattr("loraweave.extensions.ui.app.make_ui_server", make_ui_server)
    with lw.Hub(here / "adapters"):
        pass
    assert call("ui", *options).exit_code == 0
    assert opened.wait(10 if is_opened else 0.1) == is_opened


def test_a_browser_opens_only_for_somebody_at_a_terminal_with_a_screen(monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not commands.has_display()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert not commands.has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert commands.has_display()
    monkeypatch.delenv("WAYLAND_DISPLAY")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert commands.has_display()
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    assert not commands.has_display()


def test_what_cannot_be_meant_is_said_before_the_server_starts(here):
    missing = call("ui", "--hub", here / "none")
    assert (missing.exit_code, "no hub in" in missing.stderr) == (1, True)
    wrong = call("ui", "--dtype", "float3")
    assert (wrong.exit_code, "--dtype takes float32" in wrong.stderr) == (2, True)


def test_the_code_of_the_page_runs(run_page):
    run_page("docs/extensions/ui.md")
