"""The entries of every expert's update, read in blocks of whole rows: at most one dense layer is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from loraweave.composer.merge.methods._terms import Experts, Term, Weights, terms
from loraweave.composer.merge.updates import DenseUpdate
from loraweave.types import Factors

# entries of a block: small enough for the cache with a handful of experts, large enough that calls cost nothing
BLOCK = 2**15
# whole groups of rows, so that a block holds a multiple of 4 entries: one 64-bit draw serves 4 of them
ROW_GROUP = 4

# writes what is left of an expert's block: (expert, rows, block_BI, out_BI)
Keep = Callable[[int, slice, Tensor, Tensor], None]
# what a method leaves of one tensor of every expert: (entries, scratch of their shape) -> keep
Prune = Callable[["Entries", Tensor], Keep]


class Entries:
    """One tensor of every expert (the update's matrix, or its bias as one row), each as a product b_OR a_RI in fp32.

    A product is computed again whenever it is read, always in the same blocks and into the same buffer, so that two
    passes see the same bits. `weights` and `places` (among the experts first given) belong to the experts in order.
    """

    def __init__(self, products: Sequence[tuple[Tensor, Tensor]], found: Sequence[Term], *, bias: bool = False) -> None:
        self.products = [(_plain(b_OR), _plain(a_RI)) for b_OR, a_RI in products]
        self.weights = [term.weight for term in found]
        self.places = [term.place for term in found]
        self.bias = bias
        self.shape = (int(products[0][0].shape[0]), int(products[0][1].shape[1]))
        self._rows = max(1, BLOCK // max(1, self.shape[1]) // ROW_GROUP) * ROW_GROUP
        self._buffer = torch.empty(min(self._rows, self.shape[0]), self.shape[1])

    def __len__(self) -> int:
        return len(self.products)

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.shape[0], self._rows):
            yield slice(start, min(start + self._rows, self.shape[0]))

    def read(self, expert: int, rows: slice) -> Tensor:
        """The block (B, I) of one expert; the memory is used again by the next read."""
        b_OR, a_RI = self.products[expert]
        return torch.mm(b_OR[rows], a_RI, out=self._buffer[: rows.stop - rows.start])

    def magnitudes(self, expert: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the absolute values of one expert, in order."""
        for rows in self.blocks():
            yield rows, self.read(expert, rows).abs_()

    def stacks(self, keep: Keep | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of all experts (E, B, I), each passed through `keep`; the memory is used again by the next block."""
        stack_EBI = torch.empty(len(self), *self._buffer.shape)
        for rows in self.blocks():
            part_EBI = stack_EBI[:, : rows.stop - rows.start]
            for expert in range(len(self)):
                block_BI = self.read(expert, rows)
                if keep is None:
                    part_EBI[expert].copy_(block_BI)
                else:
                    keep(expert, rows, block_BI, part_EBI[expert])
            yield rows, part_EBI


def tensors(found: Sequence[Term]) -> Iterator[Entries]:
    """The tensors that an elementwise method treats one by one: the matrices, then the biases if any expert has one.

    An absent bias counts as zeros.
    """
    yield Entries([(term.factors.b_OR, term.factors.a_RI) for term in found], found)
    if any(term.factors.bias_O is not None for term in found):
        yield Entries([_row(term.factors) for term in found], found, bias=True)


def merged(found: Sequence[Term], rule: Callable[[Entries, Tensor], None]) -> DenseUpdate:
    """`rule(entries, out_OI)` applied to each of the tensors; out_OI comes uninitialised."""
    results = []
    for entries in tensors(found):
        out_OI = torch.empty(entries.shape)
        rule(entries, out_OI)
        results.append(out_OI)
    first = found[0].factors
    return DenseUpdate(results[0], results[1][0] if len(results) > 1 else None, first.kind, first.kernel)


def sum_pruned(experts: Experts, weights: Weights, prune: Prune, *, scale: float = 1.0) -> DenseUpdate:
    """One layer's scale * sum of w_e tau_e, tau_e being what `prune` leaves of expert e."""

    def rule(entries: Entries, out_OI: Tensor) -> None:
        weights_E11 = torch.tensor([weight * scale for weight in entries.weights])[:, None, None]
        for rows, stack_EBI in entries.stacks(prune(entries, out_OI)):
            # multiplied before the sum, not within it: a fused product would leave a rounding error of x - x
            torch.sum(stack_EBI.mul_(weights_E11), dim=0, out=out_OI[rows])

    return merged(terms(experts, weights), rule)


def _plain(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.float32)


def _row(factors: Factors) -> tuple[Tensor, Tensor]:
    """A bias as a product: exactly itself, or an empty sum of rank 0."""
    num_out = factors.b_OR.shape[0]
    if factors.bias_O is None:
        return torch.ones(1, 0), torch.ones(0, num_out)
    return torch.ones(1, 1), factors.bias_O.float()[None]
