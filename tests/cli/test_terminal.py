"""A terminal of 60 columns gets no longer lines, but what is meant for copying; a pipe gets whole ones and no boxes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
from command_line import adapter, call

import loraweave as lw

COLUMNS = 60
NAME = "pick_adjective_5_of_a_list_whose_words_are_many"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NUMBER = re.compile(r"(?<![\w./-])\d+(?:\.\d+)?(?![\w/-])")

VERBS = [
    ["hub", "list"],
    ["hub", "show", "left"],
    ["hub", "show", "left", "--all"],
    ["hub", "history", "left"],
    ["hub", "search", "the adjective", "--encoder", "hashing"],
    ["hub", "verify"],
    ["hub", "compositions"],
    ["merge", "left", NAME, "--weights", "0.7,-0.4", "--force", "--out", "merged"],
    ["merge", "left", NAME, "--weights", "0.7,-0.4", "--out", "adapters"],
    ["hub", "show", "lefd"],
    ["hub", "list", "--hub", "nowhere"],
    ["doctor"],
    ["--help"],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a hub of two adapters, `adapters`."""
    folder = tmp_path_factory.mktemp("terminal")
    with lw.Hub(folder / "adapters") as hub:
        for seed, name in enumerate(("left", NAME)):
            made = adapter(name, seed, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
            hub.add(made, license="Apache-2.0", tags=["pool", "lists"], description="Choose the adjective of a list.")
    return folder


def at_terminal(words, cwd):
    """What a command writes to a terminal of 60 columns, as lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {
        "TERM": "xterm",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "loraweave", *words]
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        written = b""
        # Linux says by an error that the other end is closed
        with suppress(OSError):
            while part := os.read(ours, 65536):
                written += part
    os.close(ours)
    return ESCAPE.sub("", written.decode()).replace("\r", "").splitlines()


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_no_line_is_longer_than_the_terminal_and_no_number_is_cut(words, place, monkeypatch):
    lines = at_terminal(words, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "10000")
    piped = call(*words).output
    assert "Traceback" not in piped + "".join(lines)
    assert not set("┃│━─") & set(piped)
    copied = re.compile(r"`[^`]*`|\S+")
    assert [line for line in lines if len(line) > COLUMNS and not copied.fullmatch(line.strip())] == []
    # columns that are left out are named, and free memory is another at each call
    if words not in (["--help"], ["doctor"]) and "left out, for want of width" not in "\n".join(lines):
        assert set(NUMBER.findall(piped)) <= set(NUMBER.findall("\n".join(lines)))
