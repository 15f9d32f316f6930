"""A search gives back the places that its engines took in memory, also where it raises."""

from __future__ import annotations

import pytest

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.errors import SearchFailed


@pytest.fixture
def engines(monkeypatch):
    """Every Composer made from now on, with whether it was closed."""
    made, close = {}, Composer.close

    def closed(self):
        made[self] = True
        close(self)

    class Recorded(Composer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made[self] = False

    monkeypatch.setattr(Composer, "close", closed)
    for module in ("compose", "program_search"):
        monkeypatch.setattr(f"loraweave.composer.compose.{module}.Composer", Recorded)
    return made


def test_a_search_that_fails_closes_its_engine(engines, compose_on):
    with pytest.raises(SearchFailed):
        compose_on(method="lorahub", budget=20, folds=0, objective=lambda model, examples: 1 / 0)
    assert list(engines.values()) == [True]


def test_a_search_for_a_program_that_fails_closes_its_engine(engines, tiny_llama, tokenizer, make_adapter, tmp_path, task):
    class Interrupted(Exception):
        pass

    def stop(*_):
        raise Interrupted

    with lw.Hub(tmp_path) as hub:
        hub.add(make_adapter(tiny_llama, "a"), description="swap", examples=["ab"])
        handle = tiny_llama.register_forward_pre_hook(stop)
        try:
            with pytest.raises(Interrupted):
                lw.order(tiny_llama, tokenizer, hub, task, progress=False)
        finally:
            handle.remove()
    assert list(engines.values()) == [True]
