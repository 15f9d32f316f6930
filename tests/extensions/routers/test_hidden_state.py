from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.extensions.routers.embedders.hidden_state import _REFERENCES, HiddenState


class Letters:
    """A tokenizer with an id for every byte."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text, *, truncation, max_length):
        return {"input_ids": [3 + byte % 58 for byte in text.encode("utf-8", "replace")][:max_length]}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama")


def states(model, text):
    """The mean last hidden state of one text alone."""
    ids = torch.tensor([[1, *Letters()(text, truncation=True, max_length=256)["input_ids"]]])
    with torch.no_grad():
        return model.model(input_ids=ids).last_hidden_state[0].double().mean(dim=0).numpy()


def test_a_vector_is_the_mean_state_without_the_mean_over_the_reference_texts(model):
    common = np.mean([states(model, text) for text in _REFERENCES], axis=0)
    texts = ["horse", "a much longer text than the other one", ""]
    expected = [states(model, text) - common for text in texts]
    expected = [row / np.linalg.norm(row) for row in expected]
    np.testing.assert_allclose(HiddenState(model=model, tokenizer=Letters()).embed(texts), expected, atol=1e-5)


def test_the_length_is_the_models_and_the_id_changes_with_its_weights(model):
    embedder = HiddenState(model=model, tokenizer=Letters())
    assert embedder.dim == 16
    before = embedder.id
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert HiddenState(model=model, tokenizer=Letters()).id != before
    assert embedder.id == before


def test_nothing_is_loaded_before_the_first_use():
    assert HiddenState(base_model="/no/such/folder").base_model == "/no/such/folder"
