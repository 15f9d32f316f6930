"""Vectors and the mixtures they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.errors import UnknownExpert, WeightingError
from loraweave.routers.searches._space import Space
from loraweave.routers.weights import MixtureWeights

GROUPS = {"early": ("q0", "v0"), "late": ("q1",)}


def test_without_groups_a_vector_has_a_weight_for_each_expert():
    mixture = Space(("a", "b", "c")).mixture(np.array([0.5, -1.0, 0.0]))
    assert mixture.as_dict() == {"a": 0.5, "b": -1.0, "c": 0.0}


def test_the_layers_of_a_group_share_their_weights():
    mixture = Space(("a", "b"), groups=GROUPS).mixture(np.array([0.1, 0.2, 0.3, 0.4]))
    assert mixture.layers == ("q0", "v0", "q1")
    assert mixture.for_layer("q0").tolist() == mixture.for_layer("v0").tolist() == [[pytest.approx([0.1, 0.2])]]
    assert mixture.for_layer("q1").tolist() == [[pytest.approx([0.3, 0.4])]]


@pytest.mark.parametrize("groups", [{}, GROUPS])
def test_the_vector_of_a_mixture_is_that_vector(groups):
    space = Space(("a", "b"), groups=groups)
    vector = np.linspace(-1, 1, space.size).astype(np.float32)
    assert space.vector(space.mixture(vector)).tolist() == vector.tolist()


def test_a_mapping_starts_every_group_alike_and_what_it_leaves_out_is_zero():
    assert Space(("a", "b"), groups=GROUPS).vector({"b": 0.5}).tolist() == [0.0, 0.5, 0.0, 0.5]
    assert Space(("a", "b")).vector(None).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("groups", [{}, GROUPS])
def test_a_gradient_is_pulled_back_as_autograd_does(groups):
    space = Space(("a", "b"), groups=groups)
    vector = torch.linspace(-1, 1, space.size, dtype=torch.float64, requires_grad=True)
    by_group_GE = vector.view(-1, 2)
    values_LE = by_group_GE[[0, 0, 1]] if groups else by_group_GE
    scale_LE = torch.arange(values_LE.numel(), dtype=torch.float64).view(values_LE.shape) + 1
    (values_LE * scale_LE).sum().backward()
    assert space.pull(scale_LE[None, None]).tolist() == vector.grad.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": ()}, "at least one expert"),
        ({"low": 1.0, "high": -1.0}, "low is 1.0 and high is -1.0; swap them"),
        ({"low": 0.5, "high": 0.5}, "low is 0.5 and high is 0.5"),
        ({"high": float("nan")}, "high is nan"),
        ({"groups": {"early": ()}}, "'early' has no layers"),
        ({"groups": {"x": ("q0",), "y": ("q1", "q0")}}, "'q0' is in two places"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(arguments, message):
    with pytest.raises(WeightingError, match=message):
        Space(**{"experts": ("a", "b"), **arguments})


def test_a_start_that_does_not_fit_is_refused():
    space = Space(("a", "b"))
    with pytest.raises(UnknownExpert, match="'x'"):
        space.vector({"x": 1.0})
    with pytest.raises(WeightingError, match=r"'b' the weight 2.0, outside \[-1.5, 1.5\]"):
        space.vector({"b": 2.0})
    with pytest.raises(WeightingError, match="instance scope"):
        space.vector(MixtureWeights(torch.zeros(2, 1, 1, 2), ("a", "b")))
    with pytest.raises(WeightingError, match=r"\('b', 'a'\)"):
        space.vector(MixtureWeights(torch.zeros(1, 1, 1, 2), ("b", "a")))
