"""The cost of a path of a live mixture: its arithmetic, bytes and calls, priced with measured rates.

Each kernel says in its own file what it does for a workload. The rates were fitted to timings of all paths over many shapes
(`benchmarks/paths.py`); only their ratios matter. Those of "cuda" are data-sheet values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The work of a path beside the base layer: FLOPs, bytes read and written, calls, and the items of batched calls."""

    flops: float
    num_bytes: float
    calls: float
    items: float = 0.0


@dataclass(frozen=True)
class Rates:
    """The seconds per floating point operation, per byte, per call, and per item of a batched call."""

    s_per_flop: float
    s_per_byte: float
    s_per_call: float
    s_per_item: float

    def seconds(self, cost: Cost) -> float:
        arithmetic = cost.flops * self.s_per_flop + cost.num_bytes * self.s_per_byte
        return arithmetic + cost.calls * self.s_per_call + cost.items * self.s_per_item


RATES: Mapping[tuple[str, int], Rates] = {
    ("cpu", 4): Rates(7e-12, 2.8e-11, 2.3e-6, 1e-7),
    ("cpu", 8): Rates(1.4e-11, 2.8e-11, 2.3e-6, 1e-7),
    ("cpu", 2): Rates(1.6e-12, 4e-11, 8e-6, 1.5e-6),
    ("cuda", 4): Rates(1e-13, 5e-13, 6e-6, 0.0),
    ("cuda", 8): Rates(5e-13, 5e-13, 6e-6, 0.0),
    ("cuda", 2): Rates(2e-14, 5e-13, 6e-6, 0.0),
}
# seconds of an indexing or elementwise call on a CPU
S_PER_OP = 2e-6


@dataclass(frozen=True)
class Workload:
    """One layer's part of a forward pass with weights by row.

    `num_mixtures` rows of the mixture that use any expert, each with `tokens` tokens; `largest` and `total` are the largest
    rank sum of a row and the sum over rows; `num_segments` distinct mixtures have `distinct` rank rows together, and all
    their experts `stacked`. `native` is the number of torch's threads if compiled code, which uses one, runs there, else 0.
    """

    num_mixtures: int
    largest: int
    total: int
    num_segments: int
    distinct: int
    stacked: int
    tokens: int = 1
    num_inputs: int = 0
    num_outputs: int = 0
    itemsize: int = 4
    device: str = "cpu"
    native: int = 0

    @property
    def rates(self) -> Rates:
        return RATES.get((self.device, self.itemsize), RATES["cuda", self.itemsize])

    @property
    def moved(self) -> int:
        """The number of elements of x, which are read, and of y, which are read and written."""
        return self.num_mixtures * self.tokens * (self.num_inputs + 2 * self.num_outputs)

    def of_products(
        self, rank_tokens: float, rank_rows: float, calls: float, items: float = 0.0, extra: float = 0.0
    ) -> Cost:
        """Return the cost of the products with a and b: `rank_tokens` hidden values, `rank_rows`, `extra` elements moved."""
        width = self.num_inputs + self.num_outputs
        num_bytes = self.itemsize * (self.moved + rank_rows * width + 2 * rank_tokens + extra)
        return Cost(2 * rank_tokens * width, num_bytes, calls, items)


@dataclass(frozen=True)
class TokenWorkload:
    """One layer's part of a forward pass with weights by token: `chosen` (token, expert) pairs have one that is not zero.

    The experts have `stacked` rank rows together.
    """

    num_tokens: int
    chosen: int
    num_experts: int
    stacked: int
    num_inputs: int
    num_outputs: int
    itemsize: int
