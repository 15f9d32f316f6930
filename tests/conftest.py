"""What holds for every test: no network, a seed, no cache of the user's, and the long tests last."""

from __future__ import annotations

import gc
import os
import random
import socket
from collections import defaultdict
from pathlib import Path

import hypothesis
import pytest
import shown

# before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"
# a worker of pytest-xdist has the size of a terminal that it is not
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)

from shared_models import pytest_runtest_teardown, share_in_session  # noqa: F401
from store_servers import postgres_server, s3_server  # noqa: F401
from tiny_models import (  # noqa: F401
    base,
    cache_argument,
    engine,
    make_adapter,
    make_adapters,
    make_model,
    model,
    pool,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tokenizer,
    tokens_of,
    trained,
    with_dense_update,
)

# no test asks how long an example takes
hypothesis.settings.register_profile("untimed", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).parents[1]
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# fixtures that start what `scripts/check fast` does without
APART = {"browser", "postgres_server", "s3_server", "short_reports"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("slow")
        if APART.intersection(getattr(item, "fixturenames", ())) or on_postgres(item):
            item.add_marker("apart")
    items.sort(key=lambda item: any(map(item.get_closest_marker, ("slow", "apart"))))


def on_postgres(item: pytest.Item) -> bool:
    """Return whether a parameter of the test puts its hub on PostgreSQL."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(isinstance(value, str) and value.startswith("postgres") for value in parameters)


def pytest_collection_finish() -> None:
    """Collections of garbage pass over what imports and the listing of tests made: a Trainer makes one for every fit."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # bindings that are frozen when the interpreter ends are reported as leaks
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--property", default="", help="of an entry's properties, try those that have this in their names")


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how many properties were tried (tests/properties.py), and which of them entries skipped and why."""
    calls = [report for some in terminalreporter.stats.values() for report in some if getattr(report, "when", "") == "call"]
    tried = [value for report in calls for key, value in report.user_properties if key == "properties"]
    entries = defaultdict(list)
    for _, skipped in tried:
        for entry, sentence, reason in skipped:
            entries[sentence, reason].append(entry)
    if tried:
        count = sum(map(len, entries.values()))
        terminalreporter.section(f"{sum(number for number, _ in tried)} properties of {len(tried)} entries, {count} skipped")
    for (sentence, reason), names in sorted(entries.items()):
        terminalreporter.line(f"SKIPPED {sentence}: {reason} ({', '.join(sorted(names))})")


@pytest.fixture(scope="session", autouse=True)
def only_loopback():
    """A connection to another machine is an error that no retry or fallback takes for an ordinary failure."""

    def checked(connect):
        def call(self, address, *rest):
            if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
                raise RuntimeError(f"a test may not use the network, but this one connects to {address}")
            return connect(self, address, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, checked(getattr(socket.socket, name)))
        yield


@pytest.fixture(scope="session")
def empty_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch):
    """Fast tests never see the user's cache folder; slow ones do, since the real model is kept there."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("LORAWEAVE_CACHE", str(request.getfixturevalue("empty_cache")))


@pytest.fixture(autouse=True)
def seeded():
    """Seed the random generators before a test, and return the function that does so again."""
    import numpy as np
    import torch

    def seed():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    seed()
    return seed


@pytest.fixture(autouse=True)
def toys_are_tiny(monkeypatch):
    """A model of plain torch, which has no name of its own, is called like the base that most adapters of the tests name."""
    from torch import nn

    monkeypatch.setattr(nn.Module, "name_or_path", "tiny", raising=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, and no hub named by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAWEAVE_HUB", raising=False)
    return tmp_path


@pytest.fixture
def run_page(tmp_path, monkeypatch):
    """run_page("docs/routers.md"): the names after the page's blocks, run in order in a folder where only the examples are.

    Fails where the page shows other outputs than its blocks have; `python scripts/shown.py PAGE` writes these. Prints them.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(shown.WIDTH))

    def run(page):
        names = {}
        blocks = [(block[3] or "", text) for block, text in shown.run(ROOT / page, names)]
        assert blocks
        print(*(text for _, text in blocks), sep="", end="")
        assert [(written, text) for written, text in blocks if written and not shown.is_current(written, text)] == []
        return names

    return run


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """The folder of a sentence encoder: a BERT of two layers, with a token for each character."""
    import json

    import torch
    from safetensors.torch import save_file
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-encoder")
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789 "]
    made = tokens_of(known, pad_token="[PAD]", unk_token="[UNK]")
    template = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    made.backend_tokenizer.post_processor = template
    made.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = BertModel(BertConfig(vocab_size=len(known), max_position_embeddings=256, **sizes))
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "encoder.json").write_text(json.dumps({"instruction": "task: "}))
    return folder
