"""Replicas on Ray Serve answer as the engine does, each formula by the replica that has it."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import engines
import pytest
from served_rows import PROMPTS, alone

import loraweave as lw
from loraweave.errors import CompositionError
from loraweave.extensions.cluster.replicas import formula_of, replicated

ROOT = Path(__file__).parents[3]
# fastapi comes with ray[serve]
HAS_SERVE = find_spec("ray") is not None and find_spec("fastapi") is not None
# (model name, the weights that it stands for); the last two are one formula
FORMULAS = {
    "a": {"a": 1.0},
    "c": {"c": 1.0},
    "0.7*b - 0.4*c": {"b": 0.7, "c": -0.4},
    "0.5*a + 0.5*b": {"a": 0.5, "b": 0.5},
    ".5*(b + a)": {"a": 0.5, "b": 0.5},
}


@pytest.mark.slow
@pytest.mark.skipif(not (HAS_SERVE or "LORAWEAVE_ENGINE_RAY" in os.environ), reason="needs loraweave[ray-serve]")
def test_each_formula_is_answered_by_one_replica_as_by_the_engine_and_by_another_when_that_is_killed(
    tmp_path, make_model, make_adapters, tokenizer
):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapters = make_adapters(model, "llama")
    with lw.Hub(tmp_path / "hub") as hub:
        for adapter in adapters:
            hub.add(adapter)
    fields = {"max_tokens": 9, "temperature": 0}
    given = {"root": str(ROOT), "hub": str(tmp_path / "hub"), "base": str(tmp_path / "base"), "fields": fields}
    # a formula waits for the replica that has it, which may be busy for longer than a second
    settings = {**engines.RAY, "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "100"}
    given |= {"formulas": list(FORMULAS), "once": list(FORMULAS)[:4], "prompts": PROMPTS[:3]}
    where = "here" if HAS_SERVE else "ray"
    said = engines.run(where, ROOT / "tests" / "engine_scripts" / "ray_replicas.py", given, timeout=500, **settings)
    engine = lw.Composer(model, adapters, tokenizer=tokenizer)
    expected = [alone(engine, prompt, weights)[0] for prompt in PROMPTS[:3] for weights in FORMULAS.values()]
    for asked in ("answers", "afterwards"):
        assert [(status, text) for _, _, status, _, text in said[asked]] == [(200, text) for text in expected]
    by_formula = {}
    for formula, _, _, replica, _ in said["answers"]:
        by_formula.setdefault(lw.parse(formula), set()).add(replica)
    # by chance alone the four formulas would rarely keep to one each
    assert [len(replicas) for replicas in by_formula.values()] == [1] * 4
    assert len(set.union(*by_formula.values())) == said["replicas"] == 2
    pieces = [json.loads(line[6:]) for line in said["streamed"].splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected[0]
    assert len(pieces) > 1
    assert said["refused"] == [401, 404, 400, 400, 413]
    assert said["health"] == [200, '{"status":"ok"}']


def test_a_request_is_known_by_its_formula_in_its_one_form():
    def asked(model):
        return formula_of(json.dumps({"model": model}).encode())

    assert asked(".5*(b + a)") == asked("0.5*a + .5*b") == "0.5*a + 0.5*b"
    assert [asked("auto"), asked("a +"), asked(3), formula_of(b"{"), formula_of(b"[]"), formula_of(b"\xff")] == [""] * 6


def test_replicas_want_a_key(tmp_path):
    with lw.Hub(tmp_path) as hub, pytest.raises(CompositionError, match="give the api_key"):
        replicated(hub, api_key="")
