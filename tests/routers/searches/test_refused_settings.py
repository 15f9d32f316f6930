"""Settings of one search that cannot be used, refused when it is made; conformance has those that all searches refuse."""

import math

import pytest

from loraweave import registry
from loraweave.errors import UnknownName, WeightingError


@pytest.mark.parametrize(
    ("name", "num_experts", "options", "message"),
    [
        ("gradient", 3, {"budget": 1}, "needs at least 2"),
        ("gradient", 3, {"lr": 0.0}, "got lr=0.0;"),
        ("gradient", 3, {"lr": math.nan}, "got lr=nan;"),
        ("gradient", 3, {"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ("gradient", 3, {"betas": (0.9,)}, r"betas are \(0.9,\)"),
        ("gradient", 3, {"patience": 0}, "got patience=0;"),
        ("gradient", 3, {"start": {"x": 1.0}}, "'x'"),
        ("gradient", 3, {"layers": ["l0", "l0"]}, "'l0' twice"),
        ("gradient", 3, {"form": "softmax", "low": 0.0, "high": 0.5}, r"bounds are \[0.0, 0.5\]"),
        ("similarity", 4, {"temperature": 0.0}, "got temperature=0.0;"),
        ("similarity", 4, {"temperature": -0.1}, "got temperature=-0.1;"),
        ("similarity", 4, {"temperature": math.nan}, "got temperature=nan;"),
        ("similarity", 4, {"form": "mixture", "nearest": 0}, "got nearest=0;"),
        ("similarity", 4, {"form": "softmax", "nearest": True}, "got nearest=True;"),
        (
            "grid",
            3,
            {"budget": 124},
            "budget is 124 evaluations, but 5 strengths of 3 weights are 125 candidates .* coordinate=True",
        ),
        ("grid", 3, {"budget": 12, "coordinate": True}, "budget is 12 evaluations, but Grid needs at least 13"),
        ("grid", 3, {"budget": 200, "strengths": ()}, "at least one strength"),
        ("grid", 3, {"budget": 200, "strengths": (0, 1.75)}, r"strength 1.75 is outside \[-1.5, 1.5\]"),
        ("grid", 3, {"budget": 200, "strengths": (0, math.nan)}, "strength nan is outside"),
        ("lorahub", 4, {"budget": True}, "got budget=True;"),
        ("lorahub", 4, {"budget": 8}, "budget is 8 evaluations, but Lorahub needs at least 9"),
        ("lorahub", 4, {"sigma": 0.0}, "got sigma=0.0;"),
        ("lorahub", 4, {"sigma": math.nan}, "got sigma=nan;"),
        ("lorahub", 4, {"population": 1}, "got population=1;"),
        ("lorahub", 4, {"population": 0}, "got population=0;"),
        ("lorahub", 4, {"restarts": -1}, "got restarts=-1;"),
        ("lorahub", 4, {"tolerance": math.nan}, "got tolerance=nan;"),
        ("lorahub", 4, {"start": {"x": 1.0}}, "'x'"),
        ("lorahub", 4, {"start": {"a": 2.0}}, r"weight 2.0, outside \[-1.5, 1.5\]"),
        ("random", 3, {"population": 0}, "got population=0;"),
        ("random", 3, {"simplex": True, "high": 0.5}, r"sum to 1 lie in \[0, 1\], but the box is \[-1.5, 0.5\]"),
        ("random", 3, {"simplex": True, "low": 0.1, "start": dict.fromkeys("abc", 0.2)}, r"but the box is \[0.1, 1.5\]"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(name, num_experts, options, message):
    with pytest.raises(WeightingError, match=message):
        registry.get("routers", name)("abcd"[:num_experts], **options)


@pytest.mark.parametrize(
    ("name", "option", "known"),
    [
        ("gradient", "form", "'softmax', 'free', 'softmax_bias'"),
        ("gradient", "schedule", "'cosine', 'constant'"),
        ("similarity", "form", "'selection', 'mixture', 'fusion', 'softmax'"),
    ],
)
def test_a_word_that_is_not_known_is_answered_with_those_that_are(name, option, known):
    with pytest.raises(UnknownName, match=f"method '{name}' got {option}='average'; it takes one of {known}$") as caught:
        registry.get("routers", name)("abcd", **{option: "average"})
    assert isinstance(caught.value, WeightingError)
