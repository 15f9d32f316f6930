"""Commands of the command line and what they are given: adapters for a tiny model, and rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import torch
from typer.testing import CliRunner

import loraweave as lw
from loraweave.cli import app
from loraweave.common.display import NUMBER
from loraweave.types import Factors

WIDE = 10_000
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def adapter(name, seed=0, rank=2, *, layers=LAYERS, base_model="tiny", **fields):
    """Random factors, 16 by 16, on each layer; a function of the seed."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    return lw.Adapter(name, base_model, {layer: Factors(random(rank, 16), random(16, rank)) for layer in layers}, **fields)


def call(*words, **options):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="loraweave", **options)


def process(*words, cwd, **options):
    command = [sys.executable, "-m", "loraweave", *map(str, words)]
    # rich and numpy would otherwise be asked for as many threads as there are cores
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, **options)


def told_address(process):
    """The address that a starting server prints to its stderr."""
    said = ""
    while (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", said)) is None:
        line = process.stderr.readline()
        assert line, said
        said += line
    return found[1]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _tables(text):
    """[(heading, pieces of its cells) by column] of each table in a text."""
    found, heads = [], []
    for line in text.splitlines():
        parts = [part.strip() for part in line[1:-1].split(line[0])] if line[:1] in ("┃", "│") else []
        if line.startswith("┏"):
            heads = []
        elif line.startswith("┃"):
            heads = [f"{head} {part}".strip() for head, part in zip(heads or [""] * len(parts), parts, strict=True)]
        elif line.startswith("┡"):
            found.append([(head, []) for head in heads])
        for (_, pieces), part in zip(found[-1] if parts and line[0] == "│" else [], parts, strict=False):
            pieces += part.split()
    return found


def cells(line):
    """The cells of a row of a table that was printed into a pipe, where two blanks or more are between them."""
    return re.split(" {2,}", line.strip())


def _output(words, width, monkeypatch, *, piped=False):
    # rich takes its output for a terminal then, one that has no colours
    terminal = {"TTY_COMPATIBLE": "0" if piped else "1", "TERM": "dumb", "LINES": "50", "COLUMNS": str(width)}
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    done = call(*words)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def check_table(words, width, monkeypatch):
    """The output in `width` columns beside that without a limit, and in a pipe."""
    narrow, wide = _output(words, width, monkeypatch), _output(words, WIDE, monkeypatch)
    piped = _output(words, width, monkeypatch, piped=True).splitlines()
    assert max(map(len, piped)) <= width
    assert not any(set(line) & set("┃│━─…") or line.endswith(" ") for line in piped)
    assert [line for line in piped if not line] == []
    assert max(map(len, narrow.splitlines())) <= width
    assert "…" not in narrow
    pairs = list(zip(_tables(narrow), _tables(wide), strict=True))
    assert pairs
    for fitted, whole in pairs:
        heads = [head for head, _ in whole]
        # columns go from the right, and never the first two
        assert [head for head, _ in fitted] == heads[: len(fitted)]
        assert len(fitted) >= min(2, len(heads))
        if left_out := heads[len(fitted) :]:
            assert f"left out, for want of width: {', '.join(left_out)}" in " ".join(narrow.split())
        for (head, pieces), (_, cells) in zip(fitted, whole, strict=False):
            # a second run takes other seconds, and a name that is broken may leave a number
            assert head == "seconds" or _numbers(cells) - _numbers(pieces) == Counter(), head


def _numbers(pieces):
    return Counter(piece for piece in pieces if NUMBER.fullmatch(piece))
