"""Workers that outlive the call that started them, since importing torch and transformers takes seconds; a base for them."""

from __future__ import annotations

import pytest

import loraweave as lw
from loraweave.common import spread

_IDLE = []


class WarmProcesses(spread._Processes):
    """The processes of the product, but those that idle at the end wait for the next call."""

    def __init__(self, number):
        super().__init__(number)
        while _IDLE and len(self._idle) < number:
            self._idle.append(_IDLE.pop())

    def close(self):
        whole = [future for future in self._busy if future.done() and not future.cancelled() and future.exception() is None]
        _IDLE.extend([*self._idle, *(self._busy.pop(future) for future in whole)])
        self._idle = []
        # one that works still, or lost its process, ends as in the product
        super().close()


@pytest.fixture
def warm_workers(monkeypatch):
    """Start processes of this machine once for all tests that ask for it; tests/common tries the product's own."""
    monkeypatch.setattr(spread, "_Processes", WarmProcesses)


@pytest.fixture(scope="module")
def base(make_model, tokenizer, tmp_path_factory):
    """(model, tokenizer) from a folder, which workers can load too."""
    folder = tmp_path_factory.mktemp("base")
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lw.load_base(folder)
