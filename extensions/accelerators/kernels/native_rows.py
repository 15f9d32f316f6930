"""The kernel for few tokens in one call of compiled code: no casts, no copies by row, no padding of ranks.

The factors of a batch lie side by side, each once, in the layer's own dtype, or in 16 bits where these hold the same
numbers; each row, or token, adds up its own in fp32. What `_formula` says in PyTorch is what `native.c` calculates; without
a compiler this path is not offered. Where weights vary by token, it does what `Dense` does, which is its naive twin there.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from loraweave.extend.live import Cost, Lend, Part, RowKernel, RowSets, Workload, group_by_mixture
from loraweave.extend.live import library as compiled_library

SOURCE = Path(__file__).with_name("native.c")
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# dtypes of x and y, each with those that its factors may be stored in; float16 needs a processor that converts it
STORED = {torch.float32: (torch.float32, torch.float16, torch.bfloat16), torch.bfloat16: (torch.bfloat16,)}
# as in native.c: NARROW handles this many numbers at once
LANES = 16
# whether a mode records torch's operations, among which calls of the library would be missing
is_watched = torch._C._len_torch_dispatch_stack
# with more tokens, products of matrices are faster
MOST_TOKENS = 64


class Table(ctypes.Structure):
    """The struct `Table` of native.c: sizes, and pointers to factors, counts, weights and scratch memory."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("num_rows", "num_tokens", "num_inputs", "num_outputs", "num_factors")
    ] + [(name, ctypes.c_void_p) for name in ("a", "b", "counts", "weights", "work")]


def function(dtype: torch.dtype, stored: torch.dtype) -> Any:
    """Return the library's `add` for x and y of `dtype` and factors of dtype `stored`; None if it has none."""
    if dtype not in STORED or stored not in STORED[dtype]:
        return None
    return getattr(library(), f"add_{NAMES[stored]}_{NAMES[dtype]}", None)


def shorten(*matrices: Tensor) -> list[Tensor] | None:
    """Return copies of the matrices in float16, else in bfloat16, if that changes no number; else None.

    Returns None, too, unless all are contiguous fp32. Most adapters are stored in 16 bits, and a step of few tokens spends
    its time on reading factors.
    """
    if any(m.dtype is not torch.float32 or not m.is_contiguous() or m.numel() % LANES for m in matrices):
        return None
    for stored in STORED[torch.float32][1:]:
        narrow = getattr(library(), f"narrow_{NAMES[stored]}", None)
        if narrow is None:
            continue
        with torch.inference_mode(False):
            narrowed = [torch.empty_like(matrix, dtype=stored) for matrix in matrices]
        if all(narrow(m.data_ptr(), short.data_ptr(), m.numel()) for m, short in zip(matrices, narrowed, strict=True)):
            return narrowed
    return None


def work(num_elements: int) -> Tensor:
    """Return at least `num_elements` of fp32 scratch memory, which all calls share: a call holds Python's lock."""
    if _WORK[0].numel() < num_elements:
        with torch.inference_mode(False):
            _WORK[0] = torch.empty(num_elements, dtype=torch.float32)
    return _WORK[0]


_WORK = [torch.empty(0)]


PAIRS = [f"{NAMES[stored]}_{NAMES[dtype]}" for dtype, forms in STORED.items() for stored in forms]
ADDS: dict[str, tuple[Any, list[Any]]] = {f"add_{pair}": (None, [ctypes.c_void_p] * 4) for pair in PAIRS}
NARROWS = dict.fromkeys(("narrow_f16", "narrow_bf16"), (ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]))
# called without arguments, returns the compiled library, or None without a compiler; functions for float16 are among it only
# if the processor converts float16
library = cache(partial(compiled_library, SOURCE, {**ADDS, **NARROWS}, brief=True))


class Beside(NamedTuple):
    """The cost of an operation and of a call of native.c, as multiples of torch's."""

    flops: float
    calls: float


# rates by bytes of a number, fitted at one thread; 512-bit registers hold sums of twice as many rank rows. Whether factors
# are read in 16 bits is left out: with these rates it would change no choice for the better by more than a hundredth
NATIVE = {4: Beside(1.0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1.4, 0.5), 2: Beside(3.0, 0.15)}


@dataclass(frozen=True, eq=False)
class NativeRows(RowKernel):
    """The kernel of native.c for M mixtures; each expert's rank rows are among the D rank rows once.

    `entries` has, for each mixture, (first rank row, rank, weight) of each of its experts; `of_layer` is the layer's dtype.
    """

    widens: ClassVar[bool] = False
    is_compiled: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...] | None] = ("cpu",)

    a_DI: Tensor
    b_DO: Tensor
    entries: tuple[tuple[tuple[int, int, float], ...], ...]
    of_layer: torch.dtype
    # tables by the number of tokens of a row
    _tables: dict[int, Table] = field(default_factory=dict, init=False)

    @classmethod
    def runs(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in STORED and library() is not None

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        if not work.native or work.num_mixtures * work.tokens > MOST_TOKENS:
            return None
        rates = NATIVE[work.itemsize]
        product = work.of_products(work.total * work.tokens, work.stacked, calls=0)
        # the library has one thread, and the rates are those of two
        slower = max(1.0, work.native / 2)
        return Cost(product.flops * rates.flops * slower, product.num_bytes * slower, rates.calls)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> NativeRows:
        firsts: dict[int, int] = {}
        a, b, first = [], [], 0
        for place in sorted({place for row in rows for place, _ in row}):
            firsts[place] = first
            a.append(parts[place].a_RI)
            b.append(parts[place].b_RO)
            first += len(a[-1])
        entries = tuple(tuple((firsts[p], parts[p].a_RI.shape[0], weight) for p, weight in row) for row in rows)
        # if the first factors cannot be shortened, the others mostly cannot, either
        short = dtype is torch.float32 and shorten(a[0])
        joined = shorten(torch.cat(a), torch.cat(b)) if short else None
        a_DI, b_DO = joined or (_joined(a, first, dtype, lend), _joined(b, first, dtype, lend))
        return cls(a_DI, b_DO, entries, dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.of_layer

    @property
    def num_bytes(self) -> int:
        return self.a_DI.nbytes + self.b_DO.nbytes

    @classmethod
    def add_dense(cls, dense: Any, x_BTI: Tensor, y_BTO: Tensor) -> bool:
        """Add the update of `dense`, a `Dense` kernel, to y in place; return False, with y unchanged, if unsupported.

        It multiplies x by a unless `dense.hidden_NS` has x a^T. It takes few tokens, on a CPU, all in the kernel's dtype.
        """
        num_tokens, dtype, read, stride = x_BTI.shape[0] * x_BTI.shape[1], dense.dtype, dense.hidden_NS, None
        if num_tokens * torch.get_num_threads() > MOST_TOKENS or not x_BTI.dtype is y_BTO.dtype is dtype:
            return False
        # a tensor of another class may have no memory of its own
        if not cls.runs(dense.stack.b_SO.device, dtype) or is_watched() or not type(y_BTO) is type(x_BTI) is Tensor:
            return False
        if read is None:
            read = x_BTI.contiguous()
        else:
            stride = read.stride(0)
            # below autocast the hidden values are in half precision
            if read.dtype is not dtype or read.stride(1) != 1:
                return False
        w_BTP = dense.w_BTP
        if w_BTP.shape[:2] != x_BTI.shape[:2] or w_BTP.dtype is not torch.float32 or not w_BTP.is_contiguous():
            w_BTP = dense.by_token(x_BTI.shape).to(torch.float32).expand(num_tokens, -1).contiguous()
        table = _table_of(dense, num_tokens, stride)
        add = function(dtype, table.owned[0].dtype)
        add(ctypes.addressof(table), read.data_ptr(), w_BTP.data_ptr(), y_BTO.data_ptr())
        return True

    def update(self, x_BTI: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            return self._formula(x_BTI)
        update_BTO: Tensor = _Product.apply(x_BTI, self)  # type: ignore[no-untyped-call]
        return update_BTO

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        self.adder(y_BTO.dtype, x_BTI.shape)(x_BTI, y_BTO)

    def adder(self, dtype: torch.dtype, shape: torch.Size) -> Callable[[Tensor, Tensor], object]:
        add = function(dtype, self.a_DI.dtype)
        if add is None or dtype is not self.dtype:
            return self._add_formula
        address = ctypes.addressof(self._table(shape[0] * shape[1] // len(self.entries)))

        def add_native(x_BTI: Tensor, y_BTO: Tensor) -> None:
            if is_watched():
                self._add_formula(x_BTI, y_BTO)
                return
            if not x_BTI.is_contiguous():
                x_BTI = x_BTI.contiguous()
            try:
                add(address, x_BTI.data_ptr(), None, y_BTO.data_ptr())
            except RuntimeError:
                # tensors of functorch and of tracing have no memory of their own
                self._add_formula(x_BTI, y_BTO)

        return add_native

    def _table(self, tokens: int) -> Table:
        """Return the table that native.c reads for `tokens` tokens a mixture, made once for each number of tokens."""
        if tokens in self._tables:
            return self._tables[tokens]
        uses: list[tuple[int, int, int, float]] = []
        for row, entry in enumerate(self.entries):
            for first, count, weight in entry:
                uses.append((first, count, row, weight))
        firsts, counts, numbers_of_rows, weights_of_rows = zip(*sorted(uses), strict=True) if uses else ((),) * 4
        ranks, ends = dict(zip(firsts, counts, strict=True)), accumulate(Counter(firsts).values(), initial=0)
        numbers, weights = torch.tensor([*ranks.values(), *ends, *numbers_of_rows]), torch.tensor(weights_of_rows)
        outputs, num_ranks = self.b_DO.shape[1], sum(counts)
        sums = work(tokens * (len(self.entries) * outputs + num_ranks))
        sizes = len(self.entries), tokens, self.a_DI.shape[1], outputs, len(ranks)
        factors = self.a_DI.data_ptr(), self.b_DO.data_ptr()
        table = Table(*sizes, *factors, numbers.data_ptr(), weights.data_ptr(), sums.data_ptr())
        # the memory that it points to
        table.owned = self.a_DI, self.b_DO, numbers, weights, sums
        return self._tables.setdefault(tokens, table)

    def _add_formula(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        y_BTO.add_(self._formula(x_BTI.to(self.dtype)))

    def _formula(self, x_BTI: Tensor) -> Tensor:
        """Return update_BTO, one mixture after the other, in plain torch, which has gradients."""
        wide = torch.promote_types(self.dtype, torch.float32)
        updates = []
        for x_NI, row in zip(group_by_mixture(x_BTI, len(self.entries)).to(wide), self.entries, strict=True):
            update_NO = x_NI.new_zeros(len(x_NI), self.b_DO.shape[1])
            for first, count, weight in row:
                hidden_NR = x_NI @ self.a_DI[first : first + count].to(wide).T
                update_NO = update_NO + weight * hidden_NR @ self.b_DO[first : first + count].to(wide)
            updates.append(update_NO)
        return torch.stack(updates).to(self.dtype).view(*x_BTI.shape[:2], self.b_DO.shape[1])


class _Product(torch.autograd.Function):
    """A kernel's update of x_BTI with its gradient, which is the same product of the output's gradient, a and b swapped."""

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, kernel: NativeRows) -> Tensor:
        ctx.kernel = kernel
        update_BTO = x_BTI.new_zeros(*x_BTI.shape[:2], kernel.b_DO.shape[1])
        kernel.add_(x_BTI, update_BTO)
        return update_BTO

    @staticmethod
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor, None]:
        kernel = ctx.kernel
        # as a product with a gradient of its own, for those who differentiate twice
        return _Product.apply(grad_BTO, NativeRows(kernel.b_DO, kernel.a_DI, kernel.entries, kernel.dtype)), None  # type: ignore[no-untyped-call]


def row_by_row(dense: Any, *, only_b: bool) -> list[Tensor]:
    """Return a kernel's stacked [a, b], or [b] if `only_b`, contiguous, in 16 bits if no number changes; cached."""
    stack = dense.stack
    if only_b not in stack.beside:
        factors = [stack.b_SO] if only_b else [stack.a_SI.contiguous(), stack.b_SO]
        stack.beside[only_b] = shorten(*factors) or factors
    kept: list[Tensor] = stack.beside[only_b]
    return kept


def _table_of(dense: Any, num_tokens: int, stride: int | None) -> Table:
    """Return the table that native.c reads for a `Dense` kernel, cached with the kernel's stacked factors.

    The table is for inputs x or, with a `stride` (elements from token to token), for hidden values x a^T.
    """
    stack = dense.stack
    table: Table | None = stack.beside.get((num_tokens, stride))
    if table is None:
        (num_ranks, outputs), width = stack.b_SO.shape, stack.a_SI.shape[1] if stride is None else stride
        factors, sums = row_by_row(dense, only_b=stride is not None), work(num_tokens * (outputs + num_ranks))
        owned = *factors, _uses(stack.ranks, num_tokens), sums
        *a, b, uses, sums_at = (tensor.data_ptr() for tensor in owned)
        table = Table(num_tokens, 1, width, outputs, len(stack.ranks), a[0] if a else None, b, uses, None, sums_at)
        # the memory that it points to
        table.owned = owned
        stack.beside[num_tokens, stride] = table
    return table


@lru_cache(maxsize=256)
def _uses(ranks: tuple[int, ...], num_tokens: int) -> Tensor:
    """Return `Table.counts`, int64, for experts of these `ranks`, where each token is a row that uses every expert."""
    starts = [num_tokens * number for number in range(len(ranks) + 1)]
    return torch.tensor([*ranks, *starts, *(len(ranks) * [*range(num_tokens)])])


def _joined(factors: Sequence[Tensor], num_ranks: int, dtype: torch.dtype, lend: Lend | None) -> Tensor:
    if lend is None or any(matrix.dtype is not dtype for matrix in factors):
        return torch.cat(list(factors)).to(dtype)
    width = factors[0].shape[1]
    return torch.cat(list(factors), out=lend(num_ranks * width).view(num_ranks, width))
