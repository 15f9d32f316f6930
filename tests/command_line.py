"""Commands of the command line and what they are given: adapters for a tiny model, and rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import torch
from typer.testing import CliRunner

import loraweave as lw
from loraweave.cli import app
from loraweave.types import Factors

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def adapter(name, seed=0, rank=2, *, layers=LAYERS, base_model="tiny", **fields):
    """Random factors, 16 by 16, on each layer; a function of the seed."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    return lw.Adapter(name, base_model, {layer: Factors(random(rank, 16), random(16, rank)) for layer in layers}, **fields)


def call(*words, **options):
    return CliRunner().invoke(app, [str(word) for word in words], **options)


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
