"""What `experts` refuses before it touches the base."""

import pytest

import loraweave as lw
from loraweave.errors import CompositionError, UnknownName, WeightingError


def test_what_is_no_model_is_refused():
    with pytest.raises(CompositionError, match="'SmolLM2' is none: load it first"):
        lw.experts("mola", "SmolLM2")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_experts", 4, "a list, each of which is a whole number"),
        ("target_modules", "q_proj", "a list, each of which is a text"),
        ("as_released", 1, "True or False"),
        ("alpha", True, "a finite number above 0 or None"),
    ],
)
def test_an_option_of_another_type_says_what_it_should_be(make_model, option, value, message):
    with pytest.raises(WeightingError, match=f"recipe 'mola' got {option}={value!r}; it takes {message}"):
        lw.experts("mola", make_model("llama"), **{option: value})


@pytest.mark.parametrize("name", [None, 5])
def test_what_is_no_name_is_refused(make_model, name):
    with pytest.raises(UnknownName, match=f"{name} is no recipe's name and no folder; recipes are dmoerm, "):
        lw.experts(name, make_model("llama"))
