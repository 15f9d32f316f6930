"""What a search for mixture weights takes: evaluations a second, and the whole of it, against LoraHub as published.

    python -m benchmarks search evaluations
    python -m benchmarks search evaluations --dtype bfloat16        ours in bfloat16, the original loop in float32
    python -m benchmarks search whole --task pick_verb_5            `compose(method="auto")` against the published recipe
    python -m benchmarks --base qwen2.5-coder-0.5b --pool runs/qwen search auto     its seconds and its memory alone

20 adapters, 5 examples of an unseen task. The original loop copies the adapters' state dicts, combines them in Python, loads
the result into a PeftModel and runs the examples with all their logits, once per candidate; its candidates are sums of
factors. Ours are scored in that space and in that of sums of updates. Before anything is timed, losses are compared: those
of the original loop with ours, of a population with one candidate a forward, and of a sum of updates with peft's own mixture
of 20 active adapters. Then the rank correlation of bfloat16 and float32 losses. Running nevergrad or CMA-ES is left out.

`whole`: the published recipe makes 40 evaluations, one at a time, asked for by nevergrad. "auto" measures base, every
adapter and the uniform mixture, learns weights of each layer on two folds and then on all examples, and guards. Both run on
one model in one dtype. Retrieval, which the recipe does without, is left out; `unseen` has it in its times.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from scipy.stats import spearmanr
from torch import Tensor

import loraweave as lw
from benchmarks._models import LIMIT, adapters, base_model, difference, in_peft, mix_in_peft
from benchmarks._run import Run, Table, status_bytes
from benchmarks._timing import Gate, Way, compare, require
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.model.batches import IGNORED, batch, encode, token_losses
from loraweave.extensions.routers.routers.lorahub_original import LorahubOriginal
from loraweave.extensions.tour import load_task

BOUND = 1.5
# candidates whose losses in two dtypes are ranked
NUM_RANKED = 40

app = typer.Typer()
Dtype = Literal["float32", "bfloat16"]
TaskName = Annotated[str, typer.Option(help="of the unseen tasks in --data")]


class Search:
    """The objectives of one task and a population of candidates."""

    def __init__(
        self, model: Any, tokenizer: Any, task: lw.Task, experts: Sequence[lw.Adapter], population: int, seed: int
    ) -> None:
        self.engine = lw.Composer(model, experts)
        self.deltas = ExampleLoss(self.engine, tokenizer, task, l1=0.0)
        self.factors = ExampleLoss(self.engine, tokenizer, task, l1=0.0, merge_method="factor_sum")
        self.names = self.engine.pool.names
        self.values_CE = self.draw(population, seed)
        self.candidates = self.mixtures(self.values_CE)
        self.several = in_peft(model, experts)
        self.states = {name: self._state(name) for name in self.names}
        self.single = in_peft(model, experts[:1])
        self.first = self.names[0]
        prompts = [task.prompt(text) for text, _ in task.examples]
        self.prepared = batch(model, tokenizer, encode(model, tokenizer, prompts, [target for _, target in task.examples]))
        ids_BT = self.prepared.inputs["input_ids"]
        self.labels_BT = torch.full_like(ids_BT, IGNORED)
        self.labels_BT[:, -self.prepared.targets_BK.shape[1] :] = self.prepared.targets_BK

    def draw(self, count: int, seed: int) -> np.ndarray:
        """Candidates as near to the base as a search begins."""
        return np.random.default_rng(seed).uniform(-BOUND, BOUND, (count, len(self.names))) / 5

    def mixtures(self, values_CE: np.ndarray) -> list[lw.MixtureWeights]:
        return [lw.MixtureWeights.of(dict(zip(self.names, row.tolist(), strict=True)), self.names) for row in values_CE]

    def _state(self, name: str) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(self.several, adapter_name=name, save_embedding_layers=False)
        return {key: tensor.clone() for key, tensor in state.items()}

    @torch.no_grad()
    def original(self, values_E: np.ndarray) -> float:
        """One candidate as the published code does it: the mean loss over the batch's target tokens."""
        states = copy.deepcopy(self.states)
        combined: dict[str, Tensor] = {}
        for weight, state in zip(values_E.tolist(), states.values(), strict=True):
            for key, tensor in state.items():
                combined[key] = combined[key] + weight * tensor if key in combined else weight * tensor
        set_peft_model_state_dict(self.single, combined, adapter_name=self.first)
        return float(self.single(**self.prepared.inputs, labels=self.labels_BT).loss)

    def original_to(self, dtype: torch.dtype) -> None:
        """The original loop in another dtype."""
        self.single.to(dtype)
        self.states = {name: {key: t.to(dtype) for key, t in state.items()} for name, state in self.states.items()}

    def original_loop(self) -> list[float]:
        return [self.original(values_E) for values_E in self.values_CE]

    def bare_forwards(self) -> None:
        """What a candidate costs where its weights are free: the base with all logits, one forward each."""
        with torch.no_grad():
            for _ in self.candidates:
                self.engine.model(**self.prepared.inputs, labels=self.labels_BT)

    @torch.no_grad()
    def gates(self) -> list[Gate]:
        mix_in_peft(self.several, self.candidates[0].as_dict())
        by_peft = self._mean_over_rows(self.several.get_base_model())
        by_population = torch.tensor(self.deltas(self.candidates))
        factors = torch.tensor(self.factors(self.candidates))
        originals = torch.tensor([self.original(values_E) for values_E in self.values_CE[:4]])
        return [
            Gate("the original loop's losses equal ours of sums of factors", difference(factors[:4], originals), LIMIT),
            Gate(
                "a population's losses of sums of factors equal those of one a forward",
                difference(factors, torch.tensor([self.factors([each])[0] for each in self.candidates])),
                LIMIT,
            ),
            Gate(
                "a population's losses of sums of updates equal those of one a forward",
                difference(by_population, torch.tensor([self.deltas([each])[0] for each in self.candidates])),
                LIMIT,
            ),
            Gate("a sum of updates has the loss of peft's 20 active adapters", difference(by_population[0], by_peft), LIMIT),
        ]

    def _mean_over_rows(self, model: Any) -> Tensor:
        counts_B = (self.prepared.targets_BK != IGNORED).sum(dim=1)
        return (token_losses(model, self.prepared).sum(dim=1) / counts_B).mean()


@app.command()
def evaluations(
    context: typer.Context,
    task: TaskName = "rhyme",
    dtype: Annotated[Dtype, typer.Option(help="of the base model and the factors")] = "float32",
    original_dtype: Annotated[Dtype, typer.Option(help="of the model in the original loop")] = "float32",
    targets: Annotated[Literal["qv", "all"], typer.Option(help="layers of the adapters")] = "all",
    rank: Annotated[int, typer.Option(help="of the adapters")] = 16,
    population: Annotated[int, typer.Option(help="candidates in a round")] = 12,
) -> None:
    """Evaluations a second relative to the original loop."""
    run: Run = context.obj
    model, tokenizer = base_model()
    unseen = load_task(run.data, task, run.seed, num_test=0)
    experts = adapters(run, model, targets, rank=rank)
    search = Search(model, tokenizer, unseen.task, experts, population, run.seed)
    # of a loss that all rows weigh alike, however long their targets, the original is another: a mean over tokens
    lengths = {len(row[row != IGNORED]) for row in search.prepared.targets_BK}
    if len(lengths) > 1:
        raise SystemExit(f"targets of {task} have {sorted(lengths)} tokens: take a task whose targets are of one length")
    require(search.gates())
    ranked = search.mixtures(search.draw(NUM_RANKED, run.seed + 1))
    objectives = {"factors": search.factors, "updates": search.deltas}
    exact = {name: objective(ranked) for name, objective in objectives.items()}
    model.to(getattr(torch, dtype))
    if dtype != "float32":
        title = f"losses of {NUM_RANKED} candidates in {dtype} and float32"
        table = Table(title, tuple(f"rank correlation, sums of {name}" for name in objectives))
        table.add(*(f"{spearmanr(exact[name], objective(ranked)).statistic:.3f}" for name, objective in objectives.items()))
        run.show(table)
    search.original_to(getattr(torch, original_dtype))
    ways = {
        f"original LoraHub loop in peft, {original_dtype}": search.original_loop,
        f"a bare forward each, {dtype}": search.bare_forwards,
        f"loraweave, sums of factors, populations of {population}": lambda: search.factors(search.candidates),
        f"loraweave, sums of updates, populations of {population}": lambda: search.deltas(search.candidates),
        "loraweave, sums of updates, one a forward": lambda: [search.deltas([each]) for each in search.candidates],
    }
    num_tokens = search.prepared.inputs["input_ids"].numel()
    title = (
        f"{task} ({num_tokens} tokens), {len(experts)} adapters of rank {rank} on {targets}, {len(unseen.task.examples)} "
        f"examples, ours in {dtype}"
    )
    tables = {"evaluations a second, original = 1": (next(iter(ways)), True)}
    compare(run, title, {name: Way(way, work=population) for name, way in ways.items()}, tables)


@app.command()
def whole(
    context: typer.Context,
    task: TaskName = "pick_verb_5",
    dtype: Annotated[Dtype, typer.Option(help="of the base model in all ways")] = "bfloat16",
) -> None:
    """Time to choose weights, relative to the published recipe in peft."""
    run: Run = context.obj
    model, tokenizer = base_model()
    unseen = load_task(run.data, task, run.seed, num_test=0).task
    experts = adapters(run, model, "qv")
    search = Search(model, tokenizer, unseen, experts, 1, run.seed)
    model.to(getattr(torch, dtype))
    search.original_to(getattr(torch, dtype))
    pool = lw.ExpertPool(experts)

    def published() -> None:
        solver = LorahubOriginal(pool.names, seed=run.seed)
        while not solver.stop():
            solver.tell([search.original(each.values_BTLE[0, 0, 0].double().numpy()) for each in solver.ask()])

    def recipe() -> None:
        solver = LorahubOriginal(pool.names, seed=run.seed)
        method = solver.merge_method
        solver.solve(ExampleLoss(lw.Composer(model, pool), tokenizer, unseen, kind=solver.loss, merge_method=method))

    def auto() -> None:
        lw.compose(model, tokenizer, pool, unseen, method="auto", seed=run.seed, progress=False)

    ways = {
        "LoraHub as published, in peft": Way(published),
        "the same recipe by loraweave": Way(recipe),
        'compose(method="auto")': Way(auto),
    }
    title = f"{task}, {len(experts)} adapters, {len(unseen.examples)} examples, {dtype}"
    compare(run, title, ways, {"time, as published = 1": (next(iter(ways)), False)}, rounds=5, seconds=120.0)


@app.command()
def auto(
    context: typer.Context,
    task: TaskName = "pick_verb_5",
    dtype: Annotated[Dtype, typer.Option(help="of the base model")] = "bfloat16",
) -> None:
    """Seconds and memory of `compose(method="auto")` with all adapters of --pool."""
    run: Run = context.obj
    model, tokenizer = lw.load_base(dtype=getattr(torch, dtype))
    unseen = load_task(run.data, task, run.seed, num_test=0).task
    pool = lw.ExpertPool([lw.Adapter.from_pretrained(path) for path in run.adapters()])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # so that the most memory of this process is counted from here on
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, processor = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
    made = lw.compose(model, tokenizer, pool, unseen, method="auto", seed=run.seed, progress=False)
    seconds = (time.perf_counter() - wall, time.process_time() - processor)
    most = status_bytes("VmHWM") - before
    table = Table(
        f"{task}, {len(unseen.examples)} examples, {len(pool.names)} adapters, {dtype}, {run.threads} thread(s)",
        ("base", "weights, MB", "chosen", "seconds", "processor seconds", "memory beyond before, MB", "of the weights"),
    )
    cells = (f"{weights / 1e6:.0f}", made.report.chosen, *(f"{each:.0f}" for each in seconds), f"{most / 1e6:.0f}")
    table.add(model.name_or_path, *cells, f"{most / weights:.2f}")
    run.show(table)
