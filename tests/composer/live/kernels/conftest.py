"""Every kernel as a function of stacked factors."""

import pytest
from kernel_products import by_rank_rows


@pytest.fixture(scope="session")
def product():
    """`by_rank_rows`."""
    return by_rank_rows
