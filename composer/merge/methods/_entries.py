"""The entries of every expert's update, in blocks of whole rows, and their two merges: a weighted sum, and TIES's election.

At most one dense layer is ever in memory. If the library compiled from `entries.c` is available, it computes the products,
and the merges whose pruning rules it knows; `Entries.read` and `stacks` are the naive form of the same. A method of TIES's
family is a file with its formula, its source and its defaults, which calls `merge_elected`.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraweave.common import compute
from loraweave.common.process import side_by_side
from loraweave.composer.merge.method_call import DenseUpdate, Experts, Term, Weights, terms

# entries of a block: small enough for the cache with a handful of experts, large enough that calls cost nothing
BLOCK = 2**15
# whole groups of rows, so that a block holds a multiple of 4 entries: one 64-bit draw serves 4 of them
ROW_GROUP = 4
# layers of more entries are merged one at a time, so that no two such dense updates exist at once
ALONE = 2**22
# a sample has every 4th row and every 8th column, and fewer where these are more than twice SAMPLE entries
SAMPLE_ROWS, SAMPLE_COLUMNS, SAMPLE = 4, 8, 2**17
EVERY_ROW = slice(None)

Item = TypeVar("Item")
Result = TypeVar("Result")
# sums of fp32 numbers are zero or at least 2^-149, so this decides zeros alone
FEATHER = 2.0**-200
SOURCE = Path(__file__).with_name("entries.c")
# entries of a tile, and of its width, as in entries.c
TILE, WIDE = 256, 64
_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
FUNCTIONS = {
    "read_entries": (None, [_pointer, _int, _int, _int, _pointer, _pointer]),
    "narrow_entries": (_int, [_pointer, _int, _int, _float, _float, _pointer, _pointer, _int, _pointer]),
    "merge_entries": (None, [_pointer, _pointer, _int, _int, _pointer, _pointer]),
}


class Expert(ctypes.Structure):
    """The struct `Expert` of entries.c."""

    _fields_ = (
        ("b", _pointer),
        ("a", _pointer),
        ("rank", _int),
        ("weight", _float),
        ("value", _float),
        ("last", _int),
        ("seed", ctypes.c_uint64),
        ("level", _int),
    )


class Merge(ctypes.Structure):
    """The struct `Merge` of entries.c."""

    _fields_ = (
        ("num_experts", _int),
        ("num_outputs", _int),
        ("num_inputs", _int),
        ("elects", _int),
        ("weighted", _int),
        ("counts", _int),
        ("divides", _int),
        ("scale", _float),
        ("tie", _float),
        ("cancelled", _int),
        ("balance", _int),
    )


class Numbers(NamedTuple):
    """A pruning rule of one expert's entries, as numbers for the compiled library.

    The rule keeps magnitudes above `value`, or equal to it up to the flat index `last`. Of these it keeps the ones whose 16
    random bits, from the stream of `seed`, are below `level` (-1: keep all).
    """

    value: float = -1.0
    last: int = -1
    seed: int = 0
    level: int = -1


EVERY = Numbers()


# called without arguments, returns the compiled library, or None where it is not available
library = cache(partial(compute.library, SOURCE, FUNCTIONS, brief=False))


class Rule(Protocol):
    """A pruning rule: which of an expert's entries are kept."""

    def apply(self, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        """Write the kept entries of a block of `rows` to out_BI, and zeros elsewhere."""

    @property
    def numbers(self) -> Numbers | None:
        """The rule as `Numbers` for the library; None if the library cannot express it."""


# the rules of one tensor of every expert
Prune = Callable[["Entries"], Sequence[Rule]]


class Entries:
    """One tensor of every expert, the update's matrix or its bias as a single row, each as a product b_OR a_RI in fp32.

    Each read computes a product again in the same blocks, so that two passes see the same bits. A bias
    is a product of rank 1, exactly itself, and an absent bias an empty sum of rank 0. `weights` and `places` (in the
    method's `experts`) are those of the experts, in order.
    """

    def __init__(self, found: Sequence[Term], *, bias: bool = False) -> None:
        self.products: list[tuple[Tensor, Tensor]] = []
        self.weights: list[float] = []
        self.places: list[int] = []
        self.num_ranks = 0
        for term in found:
            b_OR, a_RI = term.factors.b_OR, term.factors.a_RI
            if bias:
                bias_O = term.factors.bias_O
                a_RI = torch.ones(0, len(b_OR)) if bias_O is None else bias_O.float()[None]
                b_OR = torch.ones(1, len(a_RI))
            b_OR = b_OR.detach().to("cpu", torch.float32).contiguous()
            a_RI = a_RI.detach().to("cpu", torch.float32).contiguous()
            self.products.append((b_OR, a_RI))
            self.weights.append(term.weight)
            self.places.append(term.place)
            self.num_ranks += len(a_RI)
        self.bias = bias
        self.shape = (int(self.products[0][0].shape[0]), int(self.products[0][1].shape[1]))
        self.size = self.shape[0] * self.shape[1]
        self._rows = max(1, BLOCK // max(1, self.shape[1]) // ROW_GROUP) * ROW_GROUP

    def __len__(self) -> int:
        return len(self.products)

    def blocks(self, within: slice = EVERY_ROW, *, times: int = 1) -> Iterator[slice]:
        """Yield slices of consecutive rows, block by block or `times` blocks at once, of all rows or of those `within`."""
        places = range(self.shape[0])[within]
        for start in places[:: times * self._rows]:
            yield slice(start, min(start + times * self._rows, places.stop))

    def read(self, expert: int, rows: slice, out_BI: Tensor) -> Tensor:
        """Write the block (B, I) of one expert to contiguous memory, and return it."""
        b_OR, a_RI = self.products[expert]
        compiled = library()
        if compiled is None:
            return torch.mm(b_OR[rows], a_RI, out=out_BI)
        packed = torch.empty(max(1, a_RI.shape[0]) * WIDE)
        compiled.read_entries(
            ctypes.byref(self._in_c(expert)), self.shape[1], rows.start, rows.stop, packed.data_ptr(), out_BI.data_ptr()
        )
        return out_BI

    def magnitudes(self, expert: int, within: slice = EVERY_ROW) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, absolute values) of one expert, block by block; each block overwrites the memory of the last."""
        buffer_BI = self._buffer()
        for rows in self.blocks(within):
            yield rows, self.read(expert, rows, buffer_BI[: rows.stop - rows.start]).abs_()

    def sample(self, expert: int) -> NDArray[np.float32]:
        """Return some of the magnitudes of one expert, spread over its rows and columns, exact to rounding."""
        b_OR, a_RI = self.products[expert]
        # numpy's product takes half the time of torch's on slices
        rows, columns = b_OR.numpy()[::SAMPLE_ROWS], a_RI.numpy()[:, ::SAMPLE_COLUMNS]
        groups = max(1, len(rows) * columns.shape[1] // SAMPLE)
        parts: list[NDArray[np.float32]] = [(rows[g::groups] @ columns[:, g::groups]).reshape(-1) for g in range(groups)]
        return np.abs(np.concatenate(parts))

    def narrow(
        self, expert: int, low: float, high: float, room: int, within: slice = EVERY_ROW
    ) -> tuple[int, NDArray[np.float32]]:
        """Return (number of an expert's magnitudes above `high`, the magnitudes in low..high, about `room` of them)."""
        compiled = library()
        if compiled is None:
            above, between = 0, []
            for _, magnitudes_BI in self.magnitudes(expert, within):
                values = magnitudes_BI.numpy()
                above += int(np.count_nonzero(values > high))
                between.append(values[(values >= low) & (values <= high)])
            return above, np.concatenate(between)
        packed = torch.empty(max(1, self.products[expert][1].shape[0]) * WIDE)
        num_rows = len(range(self.shape[0])[within])
        while True:
            selected, larger = np.empty(room, np.float32), ctypes.c_int64(0)
            number = compiled.narrow_entries(
                ctypes.byref(self._in_c(expert, within=within)), self.shape[1], num_rows, low, high,
                packed.data_ptr(), selected.ctypes.data, room, ctypes.byref(larger),
            )  # fmt: skip
            if number <= room:
                return larger.value, selected[:number]
            room = number

    def stacks(self, rules: Sequence[Rule] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, all experts' entries (E, B, I)), each pruned by its expert's rule; each block overwrites the last."""
        buffer_BI = self._buffer()
        stack_EBI = torch.empty(len(self), *buffer_BI.shape)
        for rows in self.blocks():
            part_EBI = stack_EBI[:, : rows.stop - rows.start]
            for expert, part_BI in enumerate(part_EBI):
                if rules is None:
                    self.read(expert, rows, part_BI)
                else:
                    rules[expert].apply(rows, self.read(expert, rows, buffer_BI[: len(part_BI)]), part_BI)
            yield rows, part_EBI

    def merge(self, rules: Sequence[Rule], weights: Sequence[float], out_OI: Tensor, **options: Any) -> Merge | None:
        """Write the weighted sum of the pruned entries, or TIES's election, to `out_OI`; `options` are fields of `Merge`.

        Returns None, with nothing written, if the library is not available or cannot express a rule.
        """
        compiled, num_experts = library(), len(rules)
        known = list(filter(None, (rule.numbers for rule in rules)))
        if compiled is None or len(known) < num_experts:
            return None
        experts = (Expert * num_experts)(*map(self._in_c, range(num_experts), weights, known))
        room = TILE * num_experts + WIDE * self.num_ranks

        def run(rows: slice) -> Merge:
            made, work = Merge(num_experts, *self.shape, **options), torch.empty(room)
            compiled.merge_entries(ctypes.byref(made), experts, rows.start, rows.stop, work.data_ptr(), out_OI.data_ptr())
            return made

        if self.size <= ALONE:
            return run(slice(0, self.shape[0]))
        parts = list(side_by_side(run, self._parts()))
        return Merge(cancelled=any(part.cancelled for part in parts), balance=sum(part.balance for part in parts))

    def by_threads(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return `function` of each item, in order; on several threads if the layer is so large that it is merged alone."""
        if self.size <= ALONE or library() is None:
            return list(map(function, items))
        return list(side_by_side(function, items))

    def _parts(self) -> list[slice]:
        """Return slices of the rows, one for each thread, of whole groups of ROW_GROUP rows."""
        step = -(-self.shape[0] // torch.get_num_threads() // ROW_GROUP) * ROW_GROUP
        return [slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)]

    def _buffer(self) -> Tensor:
        return torch.empty(min(self._rows, self.shape[0]), self.shape[1])

    def _in_c(self, expert: int, weight: float = 1.0, numbers: Numbers = EVERY, *, within: slice = EVERY_ROW) -> Expert:
        b_OR, a_RI = self.products[expert]
        return Expert(b_OR[within].data_ptr(), a_RI.data_ptr(), a_RI.shape[0], weight, *numbers)


def tensors(found: Sequence[Term]) -> Iterator[Entries]:
    """Yield the tensors that an elementwise method treats one by one: the matrices, then the biases if any expert has one.

    An absent bias counts as zeros. Yields nothing if there are no terms.
    """
    if not found:
        return
    yield Entries(found)
    if any(term.factors.bias_O is not None for term in found):
        yield Entries(found, bias=True)


def merged(found: Sequence[Term], rule: Callable[[Entries, Tensor], None]) -> DenseUpdate:
    """Return the update whose matrix and bias `rule(entries, out_OI)` writes; out_OI comes uninitialised."""
    results = []
    for entries in tensors(found):
        out_OI = torch.empty(entries.shape)
        rule(entries, out_OI)
        results.append(out_OI)
    first = found[0].factors
    return DenseUpdate(results[0], results[1][0] if len(results) > 1 else None, first.kind, first.kernel)


def sum_pruned(experts: Experts, weights: Weights, prune: Prune, *, scale: float = 1.0) -> DenseUpdate:
    """Return one layer's scale * sum of w_e tau_e, tau_e being the update of expert e after `prune`."""

    def rule(entries: Entries, out_OI: Tensor) -> None:
        weights_E, rules = [weight * scale for weight in entries.weights], prune(entries)
        if entries.merge(rules, weights_E, out_OI) is not None:
            return
        weights_E11 = torch.tensor(weights_E)[:, None, None]
        for rows, stack_EBI in entries.stacks(rules):
            # multiplied before the sum, not within it: a fused product would leave a rounding error of x - x
            torch.sum(stack_EBI.mul_(weights_E11), dim=0, out=out_OI[rows])

    return merged(terms(experts, weights), rule)


def merge_elected(
    experts: Experts,
    weights: Weights,
    prune: Prune,
    *,
    weighted: bool = True,
    majority: str = "total",
    aggregate: str = "mean",
    scale: float = 1.0,
    tie: Callable[[], float] | None = None,
) -> DenseUpdate:
    """Return one layer's scale * (sum of w_e * tau_e over the experts that agree with the elected sign) / divisor.

    tau_e is what `prune` leaves of expert e. The sign is that of the sum over experts of the votes, taken in float64:
    w_e tau_e when `weighted`, tau_e otherwise, or their signs when `majority` is "frequency". An expert agrees where its
    vote has the elected sign; zeros never do. The divisor is the number of experts that agree (`aggregate`="mean"),
    the sum of their weights ("weights"), or 1 ("sum"); where it is zero, 1. `tie()` gives the sign, 1 or -1, of a sum that
    is zero although somebody voted; it is called only when that happens.
    """

    options: dict[str, Any] = {
        "elects": True,
        "weighted": weighted,
        "counts": majority == "frequency",
        "divides": ("sum", "mean", "weights").index(aggregate),
        "scale": scale,
    }

    def rule(entries: Entries, out_OI: Tensor) -> None:
        rules = prune(entries)
        made = entries.merge(rules, entries.weights, out_OI, tie=1.0, **options)
        if made is not None:
            if made.cancelled and tie is not None and tie() < 0:
                entries.merge(rules, entries.weights, out_OI, tie=-1.0, **options)
            return
        weights_E = torch.tensor(entries.weights)
        for rows, stack_EBI in entries.stacks(rules):
            stack_EN = stack_EBI.reshape(len(entries), -1)
            if weighted:
                # before the sum, and not within it: a fused product would leave a rounding error of x - x
                stack_EN.mul_(weights_E[:, None])
            sums_N = vote(stack_EN, majority)
            cancelled = tie is not None and _cancelled(stack_EN, sums_N)
            sign_N = decide(sums_N, tie() if tie is not None and cancelled else 1.0)
            agreeing_EN = stack_EN.mul_(sign_N).relu_()
            result_N = (agreeing_EN.sum(dim=0) if weighted else weights_E @ agreeing_EN).mul_(sign_N)
            if aggregate != "sum":
                present_EN = agreeing_EN.sign_()
                result_N.div_(divisor(present_EN.sum(dim=0) if aggregate == "mean" else weights_E @ present_EN))
            out_OI[rows] = result_N.mul_(scale).view(stack_EBI.shape[1:])

    return merged(terms(experts, weights), rule)


def vote(stack_EN: Tensor, majority: str) -> Tensor:
    """Return the sum over experts of the entries, or of their signs, in float64."""
    if majority == "frequency":
        return stack_EN.sign().sum(dim=0).double()
    return stack_EN.sum(dim=0, dtype=torch.float64)


def decide(sums_N: Tensor, tie: float) -> Tensor:
    """Return the sign of each sum of votes, 1 or -1 in fp32; a sum of zero gets the sign of `tie`. Overwrites the sums."""
    return sums_N.add_(tie * FEATHER).sign_().float()


def divisor(sums_N: Tensor) -> Tensor:
    """Return the sums, with zeros replaced by 1 in place, so that 0 / divisor is 0."""
    sums = sums_N.numpy()
    # numpy's comparisons are many times faster than torch's on a CPU
    np.add(sums, sums == 0, out=sums)
    return sums_N


def _cancelled(stack_EN: Tensor, sums_N: Tensor) -> bool:
    """Return True if any sum is zero although an expert's entry there is not."""
    silent = sums_N.numpy() == 0
    silent &= stack_EN.amax(dim=0).numpy() > 0
    return bool(silent.any())
