"""The options of this extension's methods: in Python, in a formula, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_hubs import adapter

import loraweave as lw
from loraweave.composer.formula.nodes import Mapped


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("knots", {"inner_options": None}, "'knots' got inner_options=None; it takes a mapping of names to values"),
        ("core_space", {"inner": None}, "'core_space' got inner=None; it takes a text"),
        ("lego", {"num_clusters": True}, "'lego' got num_clusters=True; it takes a whole number of at least 1 or None"),
        ("pico", {"rescale": "yes"}, "'pico' got rescale='yes'; it takes True or False"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_the_option_takes(
    method: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(lw.WeightingError, match=says):
        lw.merge([adapter(0, "a"), adapter(1, "b")], [1.0, 1.0], method=method, progress=False, **options)


@pytest.mark.parametrize("method", ["model_stock", "lego"])
def test_a_weight_that_takes_an_update_beyond_fp32_is_named(method: str) -> None:
    with pytest.raises(lw.CompositionError, match=r"'(a|b)' is up to .*its weight is .*use a smaller weight"):
        lw.merge([adapter(0, "a"), adapter(1, "b")], [1e38, 1e38], method=method, progress=False)


def test_an_option_of_a_formula_may_be_a_mapping_or_a_word() -> None:
    text = "core_space(a, b; inner=ties_per_layer, inner_options={'density'=0.3, majority=total})"
    merged = lw.parse(text).root.terms[0][1]
    assert merged.options == (
        ("inner", "ties_per_layer"),
        ("inner_options", Mapped((("density", 0.3), ("majority", "total")))),
    )


def test_a_formula_with_an_inner_method_is_that_merge() -> None:
    a, b = pool = [adapter(0, "a"), adapter(1, "b")]
    found = lw.parse("core_space(a, b; inner=ties_per_layer, inner_options={density=0.4})").merge(
        lw.ExpertPool(pool), progress=False
    )
    wanted = lw.merge([a, b], method="core_space", inner="ties_per_layer", inner_options={"density": 0.4}, progress=False)
    assert found.hash == wanted.hash
