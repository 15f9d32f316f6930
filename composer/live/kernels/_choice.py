"""The choice of a kernel for a workload: the cheapest, or the only one that a block takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import nn

import loraweave.registry as registry
from loraweave.composer.live.kernels._parts import Cost, RowKernel, Workload


@dataclass(frozen=True)
class Choice:
    """The name of a kernel; `exact` is True if it runs in fp32 although the layer's own dtype is shorter."""

    path: str
    exact: bool = False


@cache
def row_kernels() -> dict[str, type[RowKernel]]:
    """Return the kernels of the registry for weights by row."""
    kernels = {name: registry.get("kernels", name) for name in registry.names("kernels")}
    by_row = {name: kernel for name, kernel in kernels.items() if hasattr(kernel, "cost")}
    for kernel in by_row.values():
        # what has to be compiled is compiled now, and not in the midst of a model's call
        kernel.runs(torch.device("cpu"), torch.float32)
    return by_row


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
    """Return the cost of each kernel that is for such a workload."""
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
    """Take one kernel of the registry, and no other, for the block: in calls of the model, and for activations opened in it.

    Layers and weights that are not for it raise ScopeError. Raises what the kernel's `around` raises for the model.
    """
    with registry.get("kernels", name).around(model):
        token = ONLY.set(name)
        try:
            yield
        finally:
            ONLY.reset(token)


def block_of(name: str) -> str:
    """Return what users call the block in which a kernel is the only one, for messages."""
    return row_kernels()[name].block
