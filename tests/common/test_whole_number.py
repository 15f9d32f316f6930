"""Numbers of things."""

import numpy as np
import pytest

from loraweave.common.checks import is_whole, require_whole
from loraweave.errors import TrainingError, WeightingError


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
