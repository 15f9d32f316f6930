"""Clients of one task each learn together, by every strategy of `federate`; and what privacy costs many small ones.

    OMP_NUM_THREADS=1 python -m benchmarks --out runs/federation federation
    OMP_NUM_THREADS=1 python -m benchmarks --out runs/federation federation --strategies '' --clients 24 --holders 0
    OMP_NUM_THREADS=1 python -m benchmarks --out runs/federation federation --strategies '' --clients 0

The first table has a client for each task, so that no two have data alike; all strategies see the same rows. Each client's
model answers test items of its own task, and the global adapter those of all. The second has one task in many small parts,
and the global adapter's loss under `dp_fedavg` at several epsilons; the third the same task in few large parts, under
`dp_lora`, at the same epsilons. Rounds are kept in --out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import typer

import loraweave as lw
from benchmarks._run import Run, Table, pairs
from loraweave import registry
from loraweave.composer.model.scoring import losses
from loraweave.extensions.federated import federate
from loraweave.hub.base import fast_dtype

OPTIONS: dict[str, Mapping[str, Any]] = {"slora": {"density": 0.05}}
# of clients of different strength, for the strategies that take them
RANKS = (2, 4, 8)
DELTA = 1e-3
LATE = tuple(f"layers.{block}.self_attn.{end}" for block in range(20, 30) for end in ("q_proj", "v_proj"))

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="one for each client")] = "past_tense,uppercase,country_capital",
    strategies: Annotated[str, typer.Option(help="rows of the first table")] = ",".join(
        ["fedavg", "hetlora", "slora", "federa", "pfedlora", "fedms", "flexlora", "ffa"]
    ),
    rounds: Annotated[int, typer.Option(help="of every strategy")] = 3,
    steps: Annotated[int, typer.Option(help="of a client in a round")] = 6,
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 8,
    clients: Annotated[int, typer.Option(help="of the second table, none with 0")] = 24,
    holders: Annotated[int, typer.Option(help="clients of the third table, none with 0")] = 3,
    epsilons: Annotated[str, typer.Option(help="rows of the second and third table")] = "2,8,32",
) -> None:
    """Strategies on clients that differ, and utility against epsilon."""
    run: Run = context.obj
    bench = _Bench(run, *lw.load_base(dtype=fast_dtype()), tasks.split(","), num_test)
    if strategies:
        columns = (
            "strategy",
            "loss of the own model: " + ", ".join(bench.tasks),
            "of the global one",
            "MB up, down",
        )
        table = Table("clients of one task each", columns)
        table.add("base", *bench.base(), "")
        for name in strategies.split(","):
            table.add(name, *bench.strategy(name, rounds, steps))
        run.show(table)
    budgets = [float(each) for each in epsilons.split(",")]
    if clients:
        ways: list[tuple[str, Any]] = [("fedavg", None)]
        ways += [("dp_fedavg", {"epsilon": each, "delta": DELTA, "clip": 0.5}) for each in budgets]
        run.show(bench.private(clients, ways, steps=1, batch_size=2, lr=2e-2))
    if holders:
        kinds = [("example", 1e6), *(("example", each) for each in budgets), *(("batch", each) for each in budgets)]
        ways = [("dp_lora", {"epsilon": each, "delta": DELTA, "clip": 0.5, "clip_by": kind}) for kind, each in kinds]
        run.show(bench.private(holders, ways, steps=2, batch_size=24, lr=0.5))


class _Bench:
    """The model, the tasks, and how adapters are scored."""

    def __init__(self, run: Run, model: Any, tokenizer: Any, names: list[str], num_test: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tasks, self.tests = {}, {}
        for name in names:
            rows = run.rows(name)
            self.tasks[name] = lw.Task(pairs(rows, "train")[:32], instruction=rows[0]["definition"])
            self.tests[name] = pairs(rows, "test")[:num_test]
        first = run.rows(names[0])
        self.many = lw.Task(pairs(first, "train"), instruction=first[0]["definition"])
        self.given: dict[str, Any] = {"seed": run.seed, "checkpoint": run.folder(), "progress": False}

    def base(self) -> tuple[str, str]:
        found = [self._loss(self.model, name) for name in self.tasks]
        return _shown(found), f"{np.mean(found):.2f}"

    def strategy(self, name: str, rounds: int, steps: int) -> tuple[str, ...]:
        mixed = registry.get("strategies", name).mixed_ranks
        found = federate(
            self.model,
            self.tokenizer,
            self.tasks,
            strategy=name,
            strategy_options=OPTIONS.get(name),
            ranks=dict(zip(self.tasks, RANKS, strict=False)) if mixed else None,
            rounds=rounds,
            steps=steps,
            batch_size=2,
            target_modules=LATE,
            **self.given,
        )
        own = [self._with(found.client(each), each) for each in self.tasks]
        # of pfedlora it is an adapter of the output layer alone
        alike = [self._with(found.adapter, each) for each in self.tasks]
        up, down = (sum(getattr(each, way) for each in found.rounds) / 1e6 for way in ("bytes_up", "bytes_down"))
        return _shown(own), f"{np.mean(alike):.2f}", f"{up:.1f}, {down:.1f}"

    def private(self, clients: int, ways: Sequence[tuple[str, Any]], **settings: Any) -> Table:
        """One task in as many parts as there are clients, a LoRA of rank 1 in one late layer, by strategies and options."""
        (name, *_), examples = self.tasks, self.many.examples
        parts = {f"client {n}": lw.Task(examples[n::clients], instruction=self.many.instruction) for n in range(clients)}
        columns = ("strategy", "epsilon", "delta", "noise multiplier", f"{name}: loss")
        table = Table(f"{clients} clients with {len(examples) // clients} examples each", columns)
        table.add("base", "", "", "", f"{self._loss(self.model, name):.2f}")
        for strategy, options in ways:
            found = federate(
                self.model,
                self.tokenizer,
                parts,
                strategy=strategy,
                strategy_options=options,
                rounds=4,
                rank=1,
                warmup=0,
                target_modules=("layers.29.mlp.down_proj",),
                **settings,
                **self.given,
            )
            said = found.figures
            cells = [f"{said[each]:.3g}" for each in ("epsilon", "delta", "noise_multiplier")] if said else ["none", "", ""]
            way = ", ".join([strategy, *([options["clip_by"]] if "clip_by" in (options or {}) else [])])
            table.add(way, *cells, f"{self._with(found.adapter, name):.2f}")
        return table

    def _with(self, made: Any, name: str) -> float:
        if not isinstance(made, lw.Adapter):
            with made:
                return self._loss(made, name)
        with lw.Composer(self.model, {"it": made}).activate({"it": 1.0}):
            return self._loss(self.model, name)

    def _loss(self, model: Any, name: str) -> float:
        return float(np.mean(losses(model, self.tokenizer, self.tasks[name], self.tests[name])))


def _shown(losses: list[float]) -> str:
    return ", ".join(f"{loss:.2f}" for loss in losses)
