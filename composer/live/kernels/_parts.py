"""The parts of every fast path: its cost, the factors of single experts, the weights of each row, and the choice by cost.

A cost is arithmetic, bytes and calls, priced with rates that were fitted to timings of all paths over many shapes
(`benchmarks/paths.py`); only the rates' ratios matter. Those of "cuda" are data-sheet values.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

import loraweave.registry as registry


@dataclass(frozen=True)
class Cost:
    """The work of a path, without the base layer's: FLOPs, bytes read and written, calls, and items of batched calls."""

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
    """The work of one layer in a forward pass with weights by row.

    `num_mixtures` rows use any expert, each with `tokens` tokens; `largest` is the largest rank sum of a row, `total` the
    sum over rows; `num_segments` distinct mixtures have `distinct` rank rows together, their experts, each counted once,
    `stacked`. `native` is the number of torch's threads if compiled code, which uses one thread, can run, else 0.
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
        """Return the cost of the products with a and b, and of moving x and y.

        `rank_tokens` is the number of hidden values, `rank_rows` that of rows of a and b that are read, `extra` that of
        further elements moved; `calls` and `items` are those of `Cost`.
        """
        width = self.num_inputs + self.num_outputs
        num_bytes = self.itemsize * (self.moved + rank_rows * width + 2 * rank_tokens + extra)
        return Cost(2 * rank_tokens * width, num_bytes, calls, items)


@dataclass(frozen=True)
class TokenWorkload:
    """The work of one layer in a forward pass with weights by token; `chosen` (token, expert) pairs are not zero.

    The experts have `stacked` rank rows together.
    """

    num_tokens: int
    chosen: int
    num_experts: int
    stacked: int
    num_inputs: int
    num_outputs: int
    itemsize: int

    @property
    def rates(self) -> Rates:
        """The rates of a CPU, the only device where the values of token weights are read."""
        return RATES["cpu", self.itemsize]


# for each row of a batch (index of a part, its weight); parts of weight 0 are left out
RowSets = tuple[tuple[tuple[int, float], ...], ...]

Adder = Callable[[Tensor, Tensor], object]
# a function that returns flat memory of that many elements, in the kernel's dtype
Lend = Callable[[int], Tensor]


class Part(Protocol):
    """One expert's factors in one layer."""

    @property
    def a_RI(self) -> Tensor: ...

    @property
    def b_RO(self) -> Tensor: ...


class Kernel(Protocol):
    """A mixture of one layer, ready for inputs in `dtype`; x has k consecutive rows for each row of the mixture."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors that the kernel made for itself."""
        ...

    def update(self, x_BTI: Tensor) -> Tensor:
        """Return the weighted updates as (B, T, O) in `dtype`; gradients reach x."""
        ...

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        """Add the updates into y's own memory; for contiguous tensors that take part in no gradient."""
        ...

    def plus(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """Return y plus the updates in y's dtype, maybe in y's memory, which nothing else uses; gradients reach both."""
        ...

    def adder(self, dtype: torch.dtype, shape: torch.Size) -> Adder:
        """Return an `add_` for many calls with x of one shape; x and y have `dtype`, maybe shorter than the kernel's.

        It should make few calls on the way: a step of generation goes through hundreds of layers.
        """
        ...


class AddsInPlace:
    """A mixin: the methods `plus` and `adder` in terms of `update` and `add_`."""

    def plus(self: Kernel, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        # into the update's own memory rather than a third tensor of this size
        return self.update(x_BTI).to(y_BTO.dtype).add_(y_BTO)

    def adder(self: Kernel, dtype: torch.dtype, shape: torch.Size) -> Adder:
        if self.dtype is dtype:
            return self.add_

        def add(x_BTI: Tensor, y_BTO: Tensor) -> None:
            y_BTO.add_(self.update(x_BTI.to(self.dtype)))

        return add


class RowKernel(AddsInPlace):
    """The base class of kernels for mixtures whose weights by row are known before the model runs.

    The cheapest kernel of the registry runs. By default `dtype` and `num_bytes` are read off the instance's fields, which
    must then all be tensors that the kernel made, in the dtype of its inputs. A kernel with other fields overrides both.
    """

    # whether it may run in fp32 for a layer in half precision
    widens: ClassVar[bool] = True
    # whether it competes with the others; False for one that runs only where it is the only one
    is_chosen: ClassVar[bool] = True
    # the types of devices that it runs on; None for all
    devices: ClassVar[tuple[str, ...] | None] = None
    # whether it is compiled code, which has one thread
    is_compiled: ClassVar[bool] = False
    # whether it is for mixtures that all rows share (True), for several (False), or for both
    is_shared: ClassVar[bool | None] = None
    # the call that users write for a block in which this kernel alone runs
    block: ClassVar[str] = "only_kernel()"

    @classmethod
    def runs(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Return True if the kernel can run for layers of this device and dtype, with what is installed."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(iter(vars(self).values())).dtype
        return dtype

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    @classmethod
    def around(cls, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the model's calls can use this kernel alone. Raises CompositionError if they cannot."""
        return nullcontext()

    @staticmethod
    @abstractmethod
    def cost(work: Workload) -> Cost | None:
        """Return the cost of this path, without the base layer's; None for a workload that the kernel does not support."""

    @classmethod
    @abstractmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> Kernel:
        """Return the kernel for a batch of rows that all use at least one expert.

        Row sets index `parts`. Gathered tensors lie in memory from `lend`, if given.
        """


@dataclass(frozen=True, eq=False)
class SomeRows(AddsInPlace):
    """A mixture for some rows of a batch; the other rows run the base alone and take part in no product.

    `kernel` is for the rows at `place` among `num_rows`: a slice if they are consecutive, else an index tensor.
    """

    kernel: Kernel
    num_rows: int
    place: slice | Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.kernel.dtype

    @property
    def num_bytes(self) -> int:
        return self.kernel.num_bytes

    def update(self, x_BTI: Tensor) -> Tensor:
        found_MNO = self.kernel.update(group_by_mixture(x_BTI, self.num_rows)[self.place])
        update_MNO = found_MNO.new_zeros(self.num_rows, *found_MNO.shape[1:])
        update_MNO[self.place] = found_MNO
        return update_MNO.view(*x_BTI.shape[:2], found_MNO.shape[2])

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        x_MNI = group_by_mixture(x_BTI, self.num_rows)
        y_MNO = y_BTO.view(*x_MNI.shape[:2], y_BTO.shape[2])
        if isinstance(self.place, slice):
            self.kernel.add_(x_MNI[self.place], y_MNO[self.place])
        else:
            y_MNO.index_add_(0, self.place, self.kernel.update(x_MNI[self.place]).to(y_MNO.dtype))

    def adder(self, dtype: torch.dtype, shape: torch.Size) -> Adder:
        place, rows = self.place, self.num_rows
        if not isinstance(place, slice) or self.dtype is not dtype:
            return super().adder(dtype, shape)
        tokens = shape[0] * shape[1] // rows
        add_some = self.kernel.adder(dtype, torch.Size((len(range(rows)[place]), tokens, shape[2])))

        def add(x_BTI: Tensor, y_BTO: Tensor) -> None:
            x_MNI, y_MNO = x_BTI.reshape(rows, tokens, -1), y_BTO.view(rows, tokens, -1)
            add_some(x_MNI[place], y_MNO[place])

        return add


def row_sets(w_BTP: Tensor) -> RowSets | None:
    """Return each row's (expert index, weight) pairs other than 0; None if weights vary by token or need gradients."""
    if w_BTP.shape[1] != 1 or w_BTP.requires_grad:
        return None
    return tuple([tuple([(p, w) for p, w in enumerate(row) if w != 0]) for row in w_BTP[:, 0].tolist()])


def place_of(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return ascending row numbers as a slice if they are consecutive, else as an index tensor."""
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers, device=device)


def group_by_mixture(x_BTI: Tensor, num_mixtures: int) -> Tensor:
    """Return x_MNI with one row for each mixture: the N tokens of all rows that it serves, one row after the other."""
    # not -1, which is ambiguous for an input without tokens
    return x_BTI.reshape(num_mixtures, x_BTI.shape[0] * x_BTI.shape[1] // num_mixtures, x_BTI.shape[2])


def repeat_rows(w_BTE: Tensor, num_rows: int) -> Tensor:
    """Return weights with each row repeated k times, for k times as many rows; a size of 1 stays, and broadcasts."""
    if w_BTE.shape[0] in (1, num_rows):
        return w_BTE
    return w_BTE.repeat_interleave(num_rows // w_BTE.shape[0], dim=0)


def stack_a(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """Return a_SI of the parts, one below the other."""
    return torch.cat([part.a_RI for part in parts]).to(dtype)


def weigh_b(parts: Sequence[Part], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return b_SO of the parts with their weights multiplied in, in fp32 or better, and rounded once."""
    if all(weight == 1.0 for weight in weights):
        return torch.cat([part.b_RO for part in parts]).to(dtype)
    exact = torch.promote_types(parts[0].b_RO.dtype, torch.float32)
    return torch.cat([part.b_RO.to(exact) * weight for part, weight in zip(parts, weights, strict=True)]).to(dtype)


def own_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keep products on the device in the dtype of their factors within the block, also below autocast."""
    # some devices, as meta, know no autocast; and without one there is nothing to turn off
    running = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if running else nullcontext()


@dataclass(frozen=True)
class Choice:
    """The name of a kernel; `exact` is True if it runs in fp32 although the layer's own dtype is shorter."""

    path: str
    exact: bool = False


@cache
def kernels_with(what: str) -> dict[str, Any]:
    """Return {name: kernel} of the registry's kernels that have the attribute `what`.

    A RowKernel has `cost`. Extensions bring faster functions as other attributes. For weights that are written:
    `add_product`(into_MN, left_MK, right_KN), which returns True if it has added the product. For weights by token:
    `token_seconds`(work: TokenWorkload) of a kernel (parts, w_BTP, dtype) that may replace `Dense` on a CPU;
    `add_dense`(dense, x_BTI, y_BTO), which returns True if it has done the work of `Dense.add_`; and `add_experts`(y, x_NI,
    w_NE, a_SI, b_SO, ranks, most, learns=..), which returns the result of the function of that name, or None.
    """
    kernels = {name: registry.get("kernels", name) for name in registry.names("kernels")}
    return {name: kernel for name, kernel in kernels.items() if hasattr(kernel, what)}


@cache
def row_kernels() -> dict[str, type[RowKernel]]:
    """Return the kernels of the registry for weights by row."""
    by_row: dict[str, type[RowKernel]] = kernels_with("cost")
    for kernel in by_row.values():
        if kernel.is_compiled:
            # its code is built now rather than in the midst of a model's call
            kernel.runs(torch.device("cpu"), torch.float32)
    return by_row


def compiled_threads(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of torch's threads if any kernel of compiled code runs for this device and dtype, else 0."""
    for kernel in row_kernels().values():
        if kernel.is_compiled and kernel.runs(device, dtype):
            return torch.get_num_threads()
    return 0


@lru_cache(maxsize=4096)
def choose(work: Workload) -> Choice:
    """Return the cheapest kernel for a workload.

    On a CPU, products of a few tokens are faster in fp32 than in half precision, whose library calls take longer than
    the products themselves.
    """
    seconds = {Choice(path): work.rates.seconds(cost) for path, cost in costs(work).items()}
    if work.device == "cpu" and work.itemsize == 2:
        wide = replace(work, itemsize=4)
        # x goes to fp32, and the update back
        cast = Cost(0, 6 * work.num_mixtures * work.tokens * (work.num_inputs + work.num_outputs), 2)
        for path, cost in costs(wide).items():
            if row_kernels()[path].widens:
                seconds[Choice(path, exact=True)] = wide.rates.seconds(cost) + wide.rates.seconds(cast)
    return min(seconds, key=seconds.__getitem__)


def costs(work: Workload) -> dict[str, Cost]:
    """Return {kernel's name: its cost} for the kernels that support the workload."""
    costs = {}
    for path, kernel in row_kernels().items():
        runs = kernel.is_chosen and (kernel.devices is None or work.device in kernel.devices)
        if runs and kernel.is_shared is not (work.num_segments > 1) and (cost := kernel.cost(work)) is not None:
            costs[path] = cost
    return costs


# the name of the only kernel that this context takes; None if it may take any
ONLY: ContextVar[str | None] = ContextVar("loraweave_only_kernel", default=None)


@contextmanager
def only_kernel(name: str, model: nn.Module) -> Iterator[None]:
    """Use one kernel of the registry, and no other, in calls of the model and for activations opened in the block.

    Layers and weights that it does not support raise ScopeError. Raises the errors of the kernel's `around` for the model.
    """
    with registry.get("kernels", name).around(model):
        token = ONLY.set(name)
        try:
            yield
        finally:
            ONLY.reset(token)


def block_of(name: str) -> str:
    """Return the call that users write to make this kernel the only one, such as "only_kernel()", for messages."""
    return row_kernels()[name].block
