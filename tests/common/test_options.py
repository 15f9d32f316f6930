from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest

from loraweave import registry
from loraweave.common.checks import is_whole, require_whole
from loraweave.common.options import (
    Count,
    Declared,
    Range,
    Share,
    check_options,
    described,
    fits,
    options_of,
    require_known,
)
from loraweave.errors import TrainingError, UnknownName, WeightingError

Word = Literal["mean", "sum"]


def function(experts, weights, *, density: float = 0.2, aggregate: Word = "mean", seeds: tuple[int, ...] = (), **rest):
    pass


class Router:
    size: str = "a class's own annotation is no option"

    def __init__(self, pool, *, top_k: int | None = None):
        pass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    rank: int = 8
    words: tuple[str, ...] = ()
    form: ClassVar[str] = "sum"


def test_the_options_are_those_that_the_signature_declares():
    assert options_of(function, after=2, beside=("seeds",)) == {"density": float, "aggregate": Word}
    assert options_of(Router, after=1) == {"top_k": int | None}
    assert options_of(Recipe) == {"rank": int, "words": tuple[str, ...]}


def test_an_annotation_that_cannot_be_found_leaves_every_kind_open():
    def known_to_type_checkers_alone(experts, weights, *, layers: Unknown = None):  # noqa: F821
        pass

    assert options_of(known_to_type_checkers_alone, after=2) == {"layers": Any}


def test_an_unknown_name_is_told_with_the_nearest_and_all():
    with pytest.raises(
        WeightingError, match=r"^router 'x' has no option 'topk', did you mean 'top_k'\?; it has top_k, seed$"
    ):
        require_known("router 'x'", {"topk": 1}, ["top_k", "seed"])
    with pytest.raises(TrainingError, match=r"^fit\(\) has no setting 'a'; it has no settings$"):
        require_known("fit()", ["a"], [], noun="setting", error=TrainingError)
    require_known("router 'x'", {"seed": 1}, ["top_k", "seed"])


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (np.float32(0.5), float, True),
        (np.bool_(True), float, False),
        (float("inf"), float, False),
        (10**400, float, False),
        (1.5, int, False),
        (True, bool, True),
        (None, int | None, True),
        ("mean", Word, True),
        ("median", Word, False),
        (("a", "b"), tuple[str, ...], True),
        (("a", 1), tuple[str, ...], False),
        ("ab", tuple[str, ...], False),
        ({}, Mapping[str, Any], True),
        ([], Mapping[str, Any], False),
        (object(), Recipe, True),
        (1, Count, True),
        (0, Count, False),
        (1.0, Count, False),
        (None, Count | None, True),
        (0, Share, False),
        (1, Share, True),
        ("1", Share, False),
        (0, Annotated[float, Range(least=0, below=1)], True),
        (1, Annotated[float, Range(least=0, below=1)], False),
    ],
)
def test_a_value_fits_its_kind(value, kind, expected):
    assert fits(value, kind) is expected


def test_a_value_outside_its_range_is_told_with_the_range():
    with pytest.raises(
        WeightingError, match=r"^method 'm' got share=3; it takes a finite number above 0 and at most 1 or None$"
    ):
        check_options("method 'm'", {"share": 3}, {"share": Share | None})
    with pytest.raises(TrainingError, match=r"^fit\(\) has no setting 'shar', did you mean 'share'\?; it has share$"):
        check_options("fit()", {"shar": 1}, {"share": Share}, noun="setting", error=TrainingError)
    check_options("method 'm'", {"share": 0.5}, {"share": Share})


def test_a_kind_is_told_in_words():
    assert described(Count) == "a whole number of at least 1"
    assert described(int | None) == "a whole number or None"
    assert described(tuple[float, ...]) == "a list, each of which is a finite number"
    assert described(Word, "men") == "one of 'mean', 'sum', did you mean 'mean'?"


@pytest.mark.parametrize("folder", ["routers", "experts", "keys"])
def test_every_option_of_a_router_search_recipe_and_key_has_a_kind_that_can_be_read(folder):
    for name in registry.names(folder):
        assert Any not in options_of(registry.get(folder, name)).values(), name


def test_a_declared_class_refuses_a_value_outside_its_kind_before_its_init_and_leaves_unknown_names_to_python():
    class Made(Declared):
        noun = "thing"

        def __init__(self, *, size: Count = 1, form: Word = "mean"):
            raise AssertionError("not reached")

    with pytest.raises(WeightingError, match=r"^thing 'test_options' got size=0; it takes a whole number of at least 1$"):
        Made(size=0)
    with pytest.raises(UnknownName, match="one of 'mean', 'sum', did you mean 'mean'"):
        Made(form="men")
    with pytest.raises(TypeError, match="unexpected keyword argument 'sise'"):
        Made(sise=1)


@pytest.mark.parametrize(("value", "least", "whole"), [(2, 2, True), (0, 0, True), (1, 2, False), (-1, 0, False)])
def test_a_whole_number_is_one_of_at_least_the_least(value, least, whole):
    assert is_whole(value, least) is whole


@pytest.mark.parametrize("value", [True, 2.0, "2", None, np.int64(2), float("nan")])
def test_what_is_no_int_is_no_whole_number(value):
    assert not is_whole(value, 0)


@pytest.mark.parametrize("error", [TrainingError, WeightingError])
def test_what_is_none_is_named_with_its_value_in_the_error_of_the_caller(error):
    require_whole("steps", 3, 3, error)
    with pytest.raises(error, match=r"^steps is 2\.5; it must be a whole number of at least 3$"):
        require_whole("steps", 2.5, 3, error)
