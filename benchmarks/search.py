"""Evaluations a second of a search for mixture weights: populations in one forward, against the original LoraHub loop.

    python benchmarks/search.py
    python benchmarks/search.py --dtype bfloat16     ours in bfloat16, the original loop in float32

20 adapters, 5 examples of an unseen task. The original loop copies the adapters' state dicts, combines them in Python, loads
the result into a PeftModel and runs the examples with all their logits, once per candidate; its candidates are sums of
factors. Ours are scored in that space and in that of sums of updates. Before anything is timed, losses are compared: those
of the original loop with ours, of a population with one candidate a forward, and of a sum of updates with peft's own mixture
of 20 active adapters. Then the rank correlation of bfloat16 and float32 losses. Running nevergrad or CMA-ES is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from _adapters import adapters, base_model, difference, in_peft, mix_in_peft
from _ratios import Gate, Way, compare, console, require
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from scipy.stats import spearmanr
from torch import Tensor

import loraweave as lw
from loraweave.composer.batches import IGNORED, batch, encode, token_losses
from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.demo import load_task
from loraweave.routers.mixture import MixtureWeights

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
BOUND = 1.5
LIMIT = 1e-4
# candidates whose losses in two dtypes are ranked
NUM_RANKED = 40


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

    def mixtures(self, values_CE: np.ndarray) -> list[MixtureWeights]:
        return [MixtureWeights.of(dict(zip(self.names, row.tolist(), strict=True)), self.names) for row in values_CE]

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


def main(
    task: Annotated[str, typer.Option(help="of the unseen tasks in --data")] = "rhyme",
    data: Annotated[Path, typer.Option(help="a folder with tasks, as examples/data")] = DATA,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the base model and the factors")] = "float32",
    original_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="of the model in the original loop")
    ] = "float32",
    targets: Annotated[Literal["qv", "all"], typer.Option(help="layers of the adapters")] = "all",
    rank: Annotated[int, typer.Option(help="of the adapters")] = 16,
    population: Annotated[int, typer.Option(help="candidates in a round")] = 12,
    rounds: Annotated[int, typer.Option(help="at most so many rounds")] = 15,
    seconds: Annotated[float, typer.Option(help="no round that would end later")] = 60.0,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="count processor time, for one thread on a busy machine")] = False,
    seed: Annotated[int, typer.Option(help="of the examples and the candidates")] = 0,
) -> None:
    """Evaluations a second relative to the original loop."""
    torch.set_num_threads(threads)
    model, tokenizer = base_model()
    unseen = load_task(data, task, seed, num_test=0)
    experts = adapters(model, targets, seed, rank=rank)
    search = Search(model, tokenizer, unseen.task, experts, population, seed)
    # of a loss that all rows weigh alike, however long their targets, the original is another: a mean over tokens
    lengths = {len(row[row != IGNORED]) for row in search.prepared.targets_BK}
    if len(lengths) > 1:
        raise SystemExit(f"targets of {task} have {sorted(lengths)} tokens: take a task whose targets are of one length")
    require(search.gates())
    ranked = search.mixtures(search.draw(NUM_RANKED, seed + 1))
    exact = {"factors": search.factors(ranked), "updates": search.deltas(ranked)}
    model.to(getattr(torch, dtype))
    if dtype != "float32":
        for name, objective in (("factors", search.factors), ("updates", search.deltas)):
            found = spearmanr(exact[name], objective(ranked)).statistic
            console.print(f"sums of {name}: rank correlation of {NUM_RANKED} candidates in {dtype} and float32 {found:.3f}")
    search.single.to(getattr(torch, original_dtype))
    for name, state in search.states.items():
        search.states[name] = {key: tensor.to(getattr(torch, original_dtype)) for key, tensor in state.items()}
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
        f"examples, ours in {dtype}, {threads} thread(s)"
    )
    first = next(iter(ways))
    compare(
        title,
        {name: Way(run, work=population) for name, run in ways.items()},
        rounds=rounds,
        seconds=seconds,
        cpu=cpu,
        tables={"evaluations a second, original = 1": (first, True)},
    )


if __name__ == "__main__":
    typer.run(main)
