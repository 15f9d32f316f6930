"""What another mixture of a batch costs before any layer runs: host time over 224 layers, as many as a model of 8B has.

    python -m benchmarks compositions                  8 rows of 1 of 8 adapters, and 32 rows of 4 of 32; layers 576 wide
    python -m benchmarks compositions --width 4096     as wide as an 8B model's

"Arena" is what a batch pays: one tensor that says which rank rows count, whatever the width. "Tables" are what Triton's
kernels read without an arena, with the batch's factors side by side; "gathered" is what a CPU makes of a mixture that stays.
Of these two one layer is measured, and counted 224 times. The arena is compared with the gathered factors first.
"""

from __future__ import annotations

import itertools
import os
import random
import time
import warnings
from statistics import median
from typing import Annotated

import torch
import typer
from torch import nn

import loraweave as lw
from benchmarks._run import Run, Table
from benchmarks._timing import Gate, require
from loraweave.composer.live.kernels._parts import RowSets, row_sets
from loraweave.composer.live.pages import PlacedFactors
from loraweave.errors import BaseModelUnverified
from loraweave.extensions.accelerators.hooks.arena import Arena
from loraweave.extensions.accelerators.kernels.gathered import Gathered
from loraweave.extensions.accelerators.kernels.triton_gathered import TritonGathered
from loraweave.extensions.accelerators.rank_tables import RankTables
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

NUM_LAYERS = 224
# of the layers whose arena is measured, which writes the same for any
WIDTH = 8
RANK = 16
CPU = torch.device("cpu")

app = typer.Typer()


class Setting:
    """Mixtures of some of a pool's experts for each row, and an arena for them."""

    def __init__(self, rows: int, experts: int, pool: int, seed: int) -> None:
        self.rows, self.experts, self.names = rows, experts, [f"e{n}" for n in range(pool)]
        self._rng = random.Random(seed)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
        self.factors = [Factors(torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)) for _ in self.names]
        adapters = {
            name: lw.Adapter(name, "8B", {str(layer): own for layer in range(NUM_LAYERS)})
            for name, own in zip(self.names, self.factors, strict=True)
        }
        with warnings.catch_warnings(action="ignore", category=BaseModelUnverified):
            self.engine = lw.Composer(model, adapters)
        self.lease = self.engine._residents.lease(self.names)
        self.arena = Arena(0)

    def draw(self) -> tuple[MixtureWeights, RowSets]:
        """A mixture that was not there before."""
        chosen = [
            {name: self._rng.uniform(0.1, 1) for name in self._rng.sample(self.names, self.experts)}
            for _ in range(self.rows)
        ]
        mixture = MixtureWeights.of(chosen, self.names)
        sets = row_sets(mixture.values_BTLE[:, :, 0])
        assert sets is not None
        return mixture, sets

    def gate(self) -> Gate:
        """The last layer by the arena and by gathered factors."""
        (mixture, sets), layer = self.draw(), self.engine.target_layers[str(NUM_LAYERS - 1)]
        board = self.arena.prepare(mixture, self.lease, self.engine.target_layers)
        assert board is not None
        kernel = self.arena.kernel(board, layer, CPU, torch.float32, one=True)
        assert isinstance(kernel, TritonGathered)
        tables = kernel.tables
        index_GR = tables.index_GR
        x_BTI = torch.randn(self.rows, 1, WIDTH)
        wanted = Gathered.of([PlacedFactors(f.a_RI, f.b_OR.T) for f in self.factors], sets, torch.float32).update(x_BTI)
        hidden_BTR = torch.bmm(x_BTI, tables.a_DI[index_GR].mT) * tables.w_GR[:, None]
        found = torch.bmm(hidden_BTR, tables.b_DO[index_GR])
        self.arena.release(board)
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        return Gate(f"{self.rows} rows by the arena equal gathered factors", difference, 2e-6)


@app.command()
@torch.inference_mode()
def main(context: typer.Context, width: Annotated[int, typer.Option(help="of each layer")] = 576) -> None:
    """Milliseconds of processor time for a mixture that was not there before; medians of rounds that take turns."""
    run: Run = context.obj
    # where no GPU is; no kernel runs
    os.environ["TRITON_INTERPRET"] = "1"
    torch.manual_seed(run.seed)
    settings = [Setting(*shape, run.seed) for shape in ((8, 1, 8), (32, 4, 32))]
    require([setting.gate() for setting in settings])
    holds = tuple(f"{name}, MB" for name in ("arena", "tables", "gathered"))
    title = f"another mixture over {NUM_LAYERS} layers {width} wide, rank {RANK}, fp32: ms, and what it holds then"
    table = Table(title, ("rows x adapters", "arena", "tables", "gathered", *holds))
    for setting in settings:
        parts = [PlacedFactors(torch.randn(RANK, width), torch.randn(RANK, width)) for _ in setting.names]
        taken: list[tuple[float, ...]] = []
        sizes: tuple[float, ...] = ()
        for _ in range((run.rounds or 9) + 1):
            mixture, sets = setting.draw()
            times = [time.process_time()]
            board = setting.arena.prepare(mixture, setting.lease, setting.engine.target_layers)
            times.append(time.process_time())
            tables = RankTables.of(parts, sets, torch.float32)
            times.append(time.process_time())
            gathered = Gathered.of(parts, sets, torch.float32)
            times.append(time.process_time())
            assert board is not None
            setting.arena.release(board)
            taken.append(tuple(end - begin for begin, end in itertools.pairwise(times)))
            arena_bytes = setting.arena.num_bytes * width / WIDTH / NUM_LAYERS
            sizes = (arena_bytes, tables.num_bytes, gathered.num_bytes)
        # the first makes what the others use again
        own, *of_layer = (1e3 * median(times) for times in zip(*taken[1:], strict=True))
        cells = [f"{own:.2f}", *(f"{NUM_LAYERS * ms:.0f}" for ms in of_layer)]
        table.add(f"{setting.rows} x {setting.experts}", *cells, *(f"{NUM_LAYERS * size / 1e6:.0f}" for size in sizes))
    run.show(table)
