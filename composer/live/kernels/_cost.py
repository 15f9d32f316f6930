"""Which fast path a mixture takes: each one's arithmetic, bytes and calls, priced with measured rates.

The rates were fitted to timings of all paths over many shapes (`benchmarks/paths.py`); only their ratios matter.
Those of "cuda" are data-sheet values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

# of one segment, in one block of a Triton kernel
TRITON_TOKENS = 32


@dataclass(frozen=True)
class Workload:
    """One layer's part of a forward pass.

    `num_mixtures` rows of the mixture that use any expert, each with `tokens` tokens; `largest` and `total` are the
    largest rank sum of a row and the sum over rows; `num_segments` distinct mixtures have `distinct` rank rows together,
    and all their experts `stacked`. `triton` says that its kernels run there.
    """

    num_mixtures: int
    tokens: int
    largest: int
    total: int
    num_segments: int
    distinct: int
    stacked: int
    num_inputs: int
    num_outputs: int
    itemsize: int
    device: str = "cpu"
    triton: bool = False


@dataclass(frozen=True)
class Cost:
    """What a path does beside the base layer: floating point operations, bytes read and written, calls, and the items of
    batched calls."""

    flops: float
    num_bytes: float
    calls: float
    items: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Seconds per floating point operation, per byte, per call, and per item of a batched call."""

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


def costs(work: Workload) -> dict[str, Cost]:
    """What each path that can do it would do; a mixture that all rows share may be "merged"."""
    width = work.num_inputs + work.num_outputs
    num_tokens = work.num_mixtures * work.tokens
    # x is read, y read and written
    moved = num_tokens * (work.num_inputs + 2 * work.num_outputs)

    def priced(rank_tokens: float, rank_rows: float, calls: float, items: float = 0.0, extra: float = 0.0) -> Cost:
        num_bytes = work.itemsize * (moved + rank_rows * width + 2 * rank_tokens + extra)
        return Cost(2 * rank_tokens * width, num_bytes, calls, items)

    if work.num_segments == 1:
        full = work.num_inputs * work.num_outputs
        return {
            "shared": priced(num_tokens * work.largest, work.largest, 2),
            "merged": Cost(2 * num_tokens * full, work.itemsize * (moved + full), 1),
        }
    found = {
        "gathered": priced(num_tokens * work.largest, work.num_mixtures * work.largest, 2, 2 * work.num_mixtures),
        "segments": priced(work.total * work.tokens, work.distinct, 3 * work.num_segments),
        # the hidden values go through fp32 and a mask
        "dense": priced(num_tokens * work.stacked, work.stacked, 6, extra=6 * num_tokens * work.stacked),
    }
    if work.triton:
        # a launch by Triton takes about as long as two calls of a library; every token reads its own rank rows, every
        # block of a segment's tokens the segment's
        num_blocks = -(-num_tokens // (TRITON_TOKENS * work.num_segments))
        found["triton_gathered"] = priced(work.total * work.tokens, work.total * work.tokens, 4)
        found["triton_segments"] = priced(work.total * work.tokens, work.distinct * num_blocks, 4)
    return found


@dataclass(frozen=True)
class Choice:
    """A path; `exact` if it runs in fp32 although the layer's own dtype is shorter."""

    path: str
    exact: bool = False


@lru_cache(maxsize=4096)
def choose(work: Workload) -> Choice:
    """The cheapest path.

    On a CPU, products of a few tokens are faster in fp32 than in half precision, whose library calls take longer than
    the products themselves.
    """
    priced = {Choice(path): _rates(work).seconds(cost) for path, cost in costs(work).items()}
    if work.device == "cpu" and work.itemsize == 2:
        wide = replace(work, itemsize=4)
        # x goes to fp32, and the update back
        cast = Cost(0, 6 * work.num_mixtures * work.tokens * (work.num_inputs + work.num_outputs), 2)
        for path, cost in costs(wide).items():
            if path != "merged":
                priced[Choice(path, exact=True)] = _rates(wide).seconds(cost) + _rates(wide).seconds(cast)
    return min(priced, key=lambda choice: priced[choice])


def _rates(work: Workload) -> Rates:
    return RATES.get((work.device, work.itemsize), RATES["cuda", work.itemsize])


# of an indexing or elementwise call on a CPU
S_PER_OP = 2e-6


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


def sorting_pays(work: TokenWorkload) -> bool:
    """Whether, on a CPU, tokens sorted by expert (`sorted_tokens`) take less time than all experts for all (`dense`)."""
    rates = RATES["cpu", work.itemsize]
    width = work.num_inputs + work.num_outputs
    elements = work.num_tokens * work.stacked
    dense = Cost(2 * elements * width, work.itemsize * (work.stacked * width + 8 * elements), 6)
    num_used = min(work.num_experts, work.chosen)
    # a chosen token's input is copied, and its output read and written twice
    moved = work.chosen * (2 * work.num_inputs + 3 * work.num_outputs) + work.stacked * width
    ranks = work.chosen * work.stacked / work.num_experts
    by_expert = Cost(2 * ranks * width, work.itemsize * moved + 24 * work.num_tokens * work.num_experts, 2 * num_used)
    return rates.seconds(by_expert) + S_PER_OP * (5 * num_used + 10) < rates.seconds(dense)


# of an operation on one expert's tokens, which are few and copied before it
S_PER_EXPERT_OP = 8e-6
# estimates are right to about a third
CLEARLY = 0.75


def choosing_pays(work: TokenWorkload, *, learns: bool) -> bool:
    """Whether, on a CPU, trained experts that meet only the tokens which chose them (`_chosen_product`) clearly take less
    time than all experts for all tokens (`_expert_product`): in the forward pass, or where they learn in both passes."""
    rates = RATES["cpu", work.itemsize]
    width, rank = work.num_inputs + work.num_outputs, work.stacked / work.num_experts
    products, operations = (6, 13) if learns else (2, 5)
    # inputs and gradients are copied; a sum is read and written, and so is what is added to it
    moved = work.chosen * (
        8 * work.num_inputs + 6 * work.num_outputs if learns else 2 * work.num_inputs + 4 * work.num_outputs
    )
    # products with few rank rows are slower than long ones
    flops = products * work.chosen * rank * width * (1 + 8 / rank)
    chosen = rates.seconds(Cost(flops, 2 * work.itemsize * moved, 0))
    chosen += S_PER_EXPERT_OP * (operations * min(work.num_experts, work.chosen) + 10)
    return chosen < CLEARLY * rates.seconds(Cost(products * work.num_tokens * work.stacked * width, 0, 0))


# of a token's factors, which come from memory: between two layers of the same kind the caches have seen a whole block
S_PER_COLD_BYTE = 1e-10


def skipping_pays(most: int, num_experts: int, num_bytes: int) -> bool:
    """Whether, on a CPU, a call for each of one token's own experts takes less time than to read the factors of all, of so
    many bytes, in one."""
    # two products and their parts of the factors, against two products, and the weights of all rank rows
    extra_calls = 5 * most - 7
    return num_bytes * (1 - most / num_experts) * S_PER_COLD_BYTE > extra_calls * S_PER_OP
