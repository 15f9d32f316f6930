"""How many files and functions of the product four journeys run through, on tiny models; limits only go down.

Counted is what executes: a reader who follows the journey in an editor opens these files. Everything is imported before, so
that the bodies of classes, which run once, are not counted, and compiled libraries are loaded. Caches are empty, so that a
journey has the same figures alone, `pytest -s tests/test_journeys.py::test_a_merge`, and after others.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from functools import cache
from importlib import import_module

import pytest
import torch
from import_statements import AT_ROOT, MODULES, ROOT

import loraweave as lw
from loraweave import registry
from loraweave.common import compute

# (files, functions)
LIMITS = {"merge": (12, 90), "live, cold": (14, 66), "live, warm": (6, 13), "compose": (87, 1078), "serve": (54, 550)}


class Journey:
    """The files of the product with the functions that are called while it is open, in any thread that begins in it."""

    def __init__(self):
        self.functions = {}
        self._places = {}

    def __call__(self, frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and (place := self._place(code.co_filename)):
            self.functions.setdefault(place, set()).add(code.co_qualname)

    def _place(self, name):
        if name not in self._places:
            place = os.path.relpath(os.path.realpath(name), ROOT)
            self._places[name] = place if place.split(os.sep)[0] in ("loraweave", *AT_ROOT) else None
        return self._places[name]

    def __enter__(self):
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)

    def check(self, name):
        numbers = len(self.functions), sum(map(len, self.functions.values()))
        print(f"{name}: {numbers[0]} files, {numbers[1]} functions, of {LIMITS[name]}")
        assert numbers[0] <= LIMITS[name][0], sorted(self.functions)
        assert numbers[1] <= LIMITS[name][1], self.functions


@pytest.fixture(scope="module", autouse=True)
def imported():
    for module in MODULES:
        with suppress(ImportError):
            import_module(module)


@pytest.fixture(autouse=True)
def empty_caches(imported):
    """Empty the caches of the process before a journey, but for the libraries, whose loading is as an import."""
    registry._got.clear()
    loaded = [vars(sys.modules[module]).values() for module in MODULES if module in sys.modules]
    for cached in {value for values in loaded for value in values if isinstance(value, type(cache(len)))}:
        is_library = getattr(cached.__wrapped__, "func", None) is compute.library
        cached() if is_library else cached.cache_clear()


def test_a_merge(tiny_llama, make_adapter):
    a, b = (make_adapter(tiny_llama, name, rank=4, targets=("q_proj",), seed=seed) for seed, name in enumerate("ab"))
    with Journey() as journey:
        lw.merge([a, b], [1.0, 1.0], method="ties", rank=4)
    journey.check("merge")


@torch.no_grad()
def test_a_live_forward(tiny_llama, make_adapter):
    adapters = [make_adapter(tiny_llama, name, rank=4, targets=("q_proj",), seed=seed) for seed, name in enumerate("ab")]
    ids_BT = torch.randint(3, 60, (2, 5))
    with lw.Composer(tiny_llama, adapters).activate([{"a": 0.5, "b": 0.2}, None]):
        with Journey() as cold:
            tiny_llama(ids_BT)
        with Journey() as warm:
            tiny_llama(ids_BT)
    cold.check("live, cold")
    warm.check("live, warm")


@pytest.fixture
def hub(tmp_path, tiny_llama, make_adapters, monkeypatch):
    """A hub of three adapters, whose texts are embedded without a model."""
    get = registry.get
    named = {"embedders": "hashing"}
    monkeypatch.setattr(registry, "get", lambda folder, name: get(folder, named.get(folder, name)))
    with lw.Hub(tmp_path / "hub") as opened:
        for adapter in make_adapters(tiny_llama, "llama"):
            opened.add(adapter, description=f"swap the letters {adapter.name}", examples=["ab", "cd"])
        yield opened


def test_a_composition_for_a_task(tiny_llama, tokenizer, hub):
    task = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")], instruction="swap the letters")
    with Journey() as journey:
        lw.compose(tiny_llama, tokenizer, hub, task, k=3, progress=False)
    journey.check("compose")


def test_an_answer_to_a_formula(tiny_llama, tokenizer, hub):
    testclient = pytest.importorskip("starlette.testclient")
    from loraweave.serving.app import make_app

    with Journey() as journey, testclient.TestClient(make_app(hub, tiny_llama, tokenizer)) as client:
        body = {"model": "0.7*a + 0.7*b", "prompt": "ab", "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200
    journey.check("serve")
