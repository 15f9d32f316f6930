"""How long each path of a live mixture takes for one layer, the rates that explain it, and what the choice costs.

    python -m benchmarks --threads 2 paths                      float32: every path over a grid of shapes
    python -m benchmarks --threads 2 paths --dtype bfloat16

Each path meets factors that are not in a cache, as in a model whose other layers run in between. The fit minimises the
relative error of seconds = flops * a + bytes * b + calls * c + items * d: these are the rates to write into
composer/live/kernels/_parts.py. "Regret" is the time of the path that the model chooses over that of the fastest measured.
Paths are compared with the naive formula before anything is timed.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from rich.progress import track
from scipy.optimize import nnls
from torch import Tensor

from benchmarks._run import Run, Table, console
from benchmarks._timing import Gate, require
from loraweave.composer.live.kernels._parts import (
    RATES,
    Choice,
    Cost,
    Kernel,
    Rates,
    RowSets,
    Workload,
    choose,
    compiled_threads,
    costs,
    row_kernels,
)
from loraweave.composer.live.pages import PlacedFactors

LAYERS = ((576, 576), (576, 192), (576, 1536), (1536, 576))
# factors of so many bytes are cycled through, more than a cache holds
CYCLED_BYTES = 64e6
MOST_COPIES = 48
# tokens beyond which half precision is multiplied as it is
MOST_EXACT = 256

app = typer.Typer()


@dataclass(frozen=True)
class Case:
    """One layer's mixture: rows of one length, experts of one rank."""

    rows: int
    tokens: int
    experts: int
    pool: int
    rank: int
    num_inputs: int
    num_outputs: int

    def sets(self) -> RowSets:
        rng = random.Random(0)
        if self.pool == self.experts and self.rows == 1:
            return (tuple((p, 0.5) for p in range(self.experts)),)
        return tuple(tuple((p, 0.5) for p in rng.sample(range(self.pool), self.experts)) for _ in range(self.rows))


def cases() -> Iterator[Case]:
    for rows, tokens, (experts, pool), rank, (i, o) in itertools.product(
        (1, 2, 8, 32), (1, 4, 16, 64, 128), ((1, 1), (1, 4), (4, 4), (1, 20), (4, 20)), (8, 16), LAYERS
    ):
        if (rows == 1) == (pool == experts) and rows * tokens <= 1024:
            yield Case(rows, tokens, experts, pool, rank, i, o)


def workload(case: Case, dtype: torch.dtype) -> Workload:
    sets = case.sets()
    distinct = set(sets)
    return Workload(
        num_mixtures=case.rows,
        tokens=case.tokens,
        largest=case.experts * case.rank,
        total=case.rows * case.experts * case.rank,
        num_segments=len(distinct),
        distinct=len(distinct) * case.experts * case.rank,
        stacked=len({p for row in distinct for p, _ in row}) * case.rank,
        num_inputs=case.num_inputs,
        num_outputs=case.num_outputs,
        itemsize=dtype.itemsize,
        native=compiled_threads(torch.device("cpu"), dtype),
    )


def parts(case: Case, dtype: torch.dtype, seed: int) -> list[PlacedFactors]:
    generator = torch.Generator().manual_seed(seed)

    def random_factors(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    return [
        PlacedFactors(random_factors(case.rank, case.num_inputs), random_factors(case.rank, case.num_outputs))
        for _ in range(case.pool)
    ]


def made(path: str, experts: list[PlacedFactors], sets: RowSets, dtype: torch.dtype) -> Kernel:
    number = {p: number for number, p in enumerate(sorted({p for row in sets for p, _ in row}))}
    rows = tuple(tuple((number[p], weight) for p, weight in row) for row in sets)
    return row_kernels()[path].of([experts[p] for p in number], rows, dtype)


@torch.inference_mode()
def seconds(choice: Choice, case: Case, dtype: torch.dtype, repeats: int, timer: Callable[[], float]) -> float:
    """The median time of one call, of inputs in `dtype` whatever the path multiplies in."""
    sets = case.sets()
    path, own = choice.path, torch.float32 if choice.exact else dtype
    first = made(path, parts(case, own, 0), sets, own)
    num_bytes = first.num_bytes + (first.stack.num_bytes if hasattr(first, "stack") else 0)
    copies = max(1, min(MOST_COPIES, int(CYCLED_BYTES / num_bytes)))
    kernels = [first, *(made(path, parts(case, own, seed), sets, own) for seed in range(1, copies))]
    x = torch.randn(case.rows, case.tokens, case.num_inputs).to(dtype)
    y = torch.zeros(case.rows, case.tokens, case.num_outputs, dtype=dtype)
    taken = []
    for _ in range(repeats + 1):
        started = timer()
        for kernel in kernels:
            if choice.exact:
                y.add_(kernel.update(x.float()))
            else:
                kernel.add_(x, y)
        taken.append((timer() - started) / len(kernels))
    return float(np.median(taken[1:]))


@torch.inference_mode()
def gate() -> Gate:
    """All paths against the dense formula for one case."""
    case = Case(3, 5, 2, 4, 8, 33, 65)
    experts = parts(case, torch.float64, 0)
    x = torch.randn(3, 5, 33, dtype=torch.float64)
    worst = 0.0
    for path in ("gathered", "segments", "dense"):
        found = made(path, experts, case.sets(), torch.float64).update(x)
        for row, chosen in enumerate(case.sets()):
            dense = torch.stack([w * experts[p].a_RI.T @ experts[p].b_RO for p, w in chosen]).sum(dim=0)
            worst = max(worst, float((found[row] - x[row] @ dense).abs().max()))
    return Gate("paths equal the dense formula in float64", worst, 1e-12)


def fitted(found: list[tuple[Cost, float]]) -> Rates:
    """The rates, none negative, that explain the times with the least relative error."""
    rows = np.array([[cost.flops / s, cost.num_bytes / s, cost.calls / s, cost.items / s] for cost, s in found])
    scale = rows.mean(axis=0)
    solution, _ = nnls(rows / scale, np.ones(len(rows)))
    return Rates(*(float(f"{rate:.2g}") for rate in solution / scale))


@app.command()
def main(
    context: typer.Context,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of inputs and factors")] = "float32",
    repeats: Annotated[int, typer.Option(help="timed passes over the copies of a case")] = 3,
    share: Annotated[float, typer.Option(help="of the grid's cases, drawn at random")] = 1.0,
) -> None:
    """Measures, fits, and says what the choice with the rates in use costs."""
    run: Run = context.obj
    require([gate()])
    kind = getattr(torch, dtype)
    timer = time.process_time if run.cpu else time.perf_counter
    grid = list(cases())
    grid = random.Random(0).sample(grid, max(1, int(share * len(grid))))
    measured: list[tuple[Workload, dict[Choice, float]]] = []
    for case in track(grid, "cases", console=console, transient=True):
        work = workload(case, kind)
        ways = [Choice(path) for path in costs(work)]
        if kind.itemsize == 2 and case.rows * case.tokens <= MOST_EXACT:
            ways += [Choice(path, exact=True) for path in costs(work) if row_kernels()[path].widens]
        measured.append((work, {way: seconds(way, case, kind, repeats, timer) for way in ways}))
    # compiled code has rates of its own, in those of torch
    pairs = [
        (costs(work)[way.path], s)
        for work, found in measured
        for way, s in found.items()
        if not way.exact and way.path != "native_rows"
    ]
    console.print(f"fitted for {dtype}, {run.threads} thread(s): {fitted(pairs)}")
    console.print(f"in use: {RATES['cpu', kind.itemsize]}")
    report(run, measured)


def report(run: Run, measured: list[tuple[Workload, dict[Choice, float]]]) -> None:
    """What the choice costs, over all cases and by the fastest path, and where it costs most."""
    regrets: list[float] = []
    wins: dict[str, list[float]] = {}
    for work, found in measured:
        best = min(found, key=lambda way: found[way])
        regrets.append(found.get(choose(work), max(found.values())) / found[best])
        wins.setdefault(_name(best), []).append(regrets[-1])
    quantiles = f"95 % {np.percentile(regrets, 95):.2f}, largest {max(regrets):.2f}"
    for place in np.argsort(regrets)[::-1][:3]:
        work, found = measured[place]
        times = ", ".join(f"{_name(way)} {s * 1e6:.0f} us" for way, s in found.items())
        console.print(f"{regrets[place]:.2f}: {_name(choose(work))} for {work}: {times}")
    title = f"regret over {len(regrets)} cases: mean {np.mean(regrets):.2f}, {quantiles}"
    table = Table(title, ("fastest path", "cases", "regret there, mean", "largest"))
    for name, values in sorted(wins.items()):
        table.add(name, str(len(values)), f"{np.mean(values):.2f}", f"{max(values):.2f}")
    run.show(table)


def _name(choice: Choice) -> str:
    return f"{choice.path} in fp32" if choice.exact else choice.path
