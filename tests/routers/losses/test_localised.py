"""The loss at its least, without a difference of halves, at collapse, and as its formula."""

import statistics

import pytest
import torch

from loraweave.routers.losses.localised import localised

FIRST_B = torch.tensor([True, False, False])


def uses(own, other):
    """use_BE of four experts, for rows whose own half is the first, and twice the second."""
    return torch.tensor([[own, own, other, other], [other, other, own, own], [other, other, own, own]], dtype=torch.float64)


def test_it_is_0_where_a_row_uses_its_own_half_more_by_the_ratio_of_delta():
    assert float(localised(uses(1.1, 0.9), FIRST_B, 0.1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("own", "other"), [(1.0, 1.0), (0.9, 1.1), (1.2, 0.8)])
def test_it_is_above_0_where_use_is_not_in_that_ratio(own, other):
    assert float(localised(uses(own, other), FIRST_B, 0.1)) > 0.005


def test_training_gives_the_own_half_more_and_so_the_most():
    scores_BE = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scores_BE], lr=2.0)
    for _ in range(400):
        optimizer.zero_grad()
        localised(scores_BE.softmax(dim=1), FIRST_B, 0.1).backward()
        optimizer.step()
    torch.testing.assert_close(scores_BE.detach().softmax(dim=1), uses(0.275, 0.225), rtol=1e-3, atol=0)


def test_it_is_its_formula():
    use_BE = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = [
        float(use_BE[row, expert]) * (0.8 if (expert < 2) == (row == 0) else 1.2) for row in range(3) for expert in range(4)
    ]
    expected = statistics.variance(scaled) / statistics.mean(scaled) ** 2
    assert float(localised(use_BE, FIRST_B, 0.2)) == pytest.approx(expected, rel=1e-8)


def test_without_a_difference_of_halves_it_is_0_where_all_are_alike():
    assert float(localised(uses(0.25, 0.25), FIRST_B, 0.0)) == pytest.approx(0, abs=1e-12)


def test_it_is_the_number_of_all_entries_where_one_has_everything():
    use_BE = torch.zeros(3, 4)
    use_BE[1, 2] = 1
    assert float(localised(use_BE, FIRST_B, 0.1)) == pytest.approx(12)


def test_rows_of_one_kind_have_one_row_of_factors():
    use_BE = torch.rand(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone, twice = localised(use_BE, FIRST_B[:1], 0.1), localised(use_BE.expand(2, 4), FIRST_B[:1].expand(2), 0.1)
    # 8 entries with the same deviations, twice each, over 7 instead of 4 over 3
    assert float(twice) == pytest.approx(float(alone) * (2 / 7) / (1 / 3), rel=1e-8)
