"""BYOM-LoRA, by which a composition is cut to a rank, against numpy's singular values."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import random_factors

from loraweave.composer.compose.refine import byom
from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter

factors = partial(random_factors, rank=4, num_out=9, num_in=11)


def adapter(**layers):
    layers = layers or {"x": factors(0), "y": factors(1, rank=2)}
    return Adapter("one", "base", layers, card={"tags": ["t"], "report": {}})


def tensors(one):
    return [tensor for layer in sorted(one.layers) for tensor in (one.layers[layer].a_RI, one.layers[layer].b_OR)]


def flat(one):
    return np.concatenate([tensor.double().numpy().ravel() for tensor in tensors(one)])


def test_byom_cuts_each_layer_by_its_singular_values_and_tells_the_error():
    given = adapter()
    found = byom(given, 2)
    assert {layer: one.rank for layer, one in found.layers.items()} == {"x": 2, "y": 2}
    delta = given.delta("x").double().numpy()
    u, sigma, vh = np.linalg.svd(delta)
    assert np.allclose(found.delta("x").numpy(), u[:, :2] * sigma[:2] @ vh[:2], rtol=1e-4, atol=1e-5)
    errors = found.card["compression"]
    lost = np.sum(sigma[2:] ** 2)
    assert errors["layers"]["x"] == pytest.approx(math.sqrt(lost / np.sum(sigma**2)), rel=1e-5)
    assert errors["layers"]["y"] == 0.0
    total = np.sum(sigma**2) + float(given.delta("y").double().square().sum())
    assert errors["relative_error"] == pytest.approx(math.sqrt(lost / total), rel=1e-5)


def test_byom_at_the_rank_it_has_loses_nothing():
    given = adapter()
    assert byom(given, 4).hash == given.hash


def test_byom_leaves_what_is_no_factor_and_the_adapter_given():
    given = Adapter("one", "base", {"x": factors(0, bias_O=torch.ones(9), gain_O=torch.ones(9))}, heads={"h": torch.ones(2)})
    before = given.hash, flat(given)
    found = byom(given, 1)
    assert torch.equal(found.layers["x"].bias_O, torch.ones(9))
    assert torch.equal(found.layers["x"].gain_O, torch.ones(9))
    assert torch.equal(found.heads["h"], torch.ones(2))
    assert np.array_equal(flat(given), before[1])
    assert Adapter("one", "base", given.layers, heads=given.heads).hash == before[0]


def test_byom_refuses_a_rank_below_one():
    with pytest.raises(WeightingError, match="rank=0"):
        byom(adapter(), 0)


def test_byom_names_its_parent_and_drops_the_parent_s_report():
    given = adapter()
    card = byom(given, 2).card
    assert card["recipe"] == {"method": "byom", "options": {"rank": 2}, "parents": [{"hash": given.hash, "name": "one"}]}
    assert card["tags"] == ["t"]
    assert "report" not in card
