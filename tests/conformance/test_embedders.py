"""What every embedder promises; a new file in retrieval/embedders is tested from the moment it exists."""

from __future__ import annotations

import numpy as np
import pytest
from properties import Properties

from loraweave import registry
from loraweave.errors import PackageMissing

TEXTS = [
    "the cat sat",
    "Das ist gut.",
    "",
    "   ",
    "猫が座った",
    "a\x00b\x07c",
    "lone \ud800 surrogate",
    "the cat sat",
    "word " * 400,
]


TRAITS = {name: registry.traits_of(registry.get("embedders", name)) for name in registry.names("embedders")}
PROPERTIES = Properties(TRAITS)


@pytest.mark.parametrize("name", TRAITS)
def test_an_embedder_keeps_all_properties(name, request):
    try:
        embedder = registry.get("embedders", name)()
        embedder.embed(["a"])
    except PackageMissing as error:
        pytest.skip(str(error))
    # rows: those of all texts in one call
    PROPERTIES.walk(request, name, embedder=embedder, rows=embedder.embed(TEXTS))


@PROPERTIES.add()
def embeddings_are_finite_fp32_rows_of_unit_norm(embedder, rows):
    assert rows.shape == (len(TEXTS), embedder.dim)
    assert rows.dtype == np.float32
    np.testing.assert_allclose((rows.astype(np.float64) ** 2).sum(axis=1), 1.0, atol=1e-5)


@PROPERTIES.add()
def no_texts_give_no_rows(embedder):
    assert embedder.embed([]).shape == (0, embedder.dim)


@PROPERTIES.add()
def a_batch_equals_its_texts_one_by_one(embedder, rows):
    one_by_one = np.concatenate([embedder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(rows, one_by_one, atol=2e-6)


@PROPERTIES.add()
def the_order_of_a_batch_does_not_matter(embedder, rows):
    np.testing.assert_allclose(embedder.embed(TEXTS[::-1])[::-1], rows, atol=2e-6)


@PROPERTIES.add()
def equal_texts_get_equal_rows(rows):
    assert rows[0].tobytes() == rows[7].tobytes()


@PROPERTIES.add()
def a_second_call_gives_the_same_bytes(embedder, rows):
    assert embedder.embed(TEXTS).tobytes() == rows.tobytes()


@PROPERTIES.add()
def different_texts_differ(embedder):
    rows = embedder.embed(["the cat sat", "12 + 30"])
    assert rows[0] @ rows[1] < 0.9


@PROPERTIES.add()
def ten_megabytes_equal_their_beginning(embedder):
    text = "cat and dog " * 900_000
    np.testing.assert_allclose(embedder.embed([text]), embedder.embed([text[:16_384]]), atol=1e-6)


@PROPERTIES.add()
def the_id_is_stable_and_names_the_embedder(embedder):
    again = type(embedder)()
    assert again.id == embedder.id
    assert embedder.id.startswith(f"{type(embedder).__name__.lower()}:")
