"""Evaluations a second of LoraHub's search: populations in one forward, one candidate a forward, and the original loop.

    python benchmarks/search_speed.py
    python benchmarks/search_speed.py --dtype bfloat16     ours in bfloat16, the original loop in float32

20 adapters, 5 examples of an unseen task. The original loop combines the adapters' state dicts in Python, loads the result
into a PeftModel and runs the examples with all their logits, once per candidate; its candidates are sums of factors, ours
sums of updates. Before anything is timed, losses are compared: a population's with one candidate a forward, with peft's own
mixture of 20 active adapters, and the original loop's with our `factor_sum`. Running nevergrad or CMA-ES is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from _adapters import adapters, base_model, difference, in_peft, mix_in_peft
from _ratios import Gate, Way, compare, require
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

import loraweave as lw
from loraweave.composer.batches import IGNORED, batch, encode, token_losses
from loraweave.composer.example_loss import ExampleLoss
from loraweave.demo import load_task
from loraweave.routers.mixture import MixtureWeights

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
POPULATION = 8
BOUND = 1.5
LIMIT = 1e-4


class Search:
    """The objectives of one task and a population of candidates."""

    def __init__(self, model: Any, tokenizer: Any, task: lw.Task, seed: int) -> None:
        experts = adapters(model, "qv", seed)
        self.engine = lw.Composer(model, experts)
        self.objective = ExampleLoss(self.engine, tokenizer, task)
        names = self.engine.pool.names
        self.values_CE = np.random.default_rng(seed).uniform(-BOUND, BOUND, (POPULATION, len(names))) / 5
        self.candidates = [MixtureWeights.of(dict(zip(names, row.tolist(), strict=True)), names) for row in self.values_CE]
        self.several = in_peft(model, experts)
        self.states = {name: self._state(name) for name in names}
        self.single = in_peft(model, experts[:1])
        self.first = names[0]
        prompts = [task.prompt(text) for text, _ in task.examples]
        self.prepared = batch(model, tokenizer, encode(model, tokenizer, prompts, [target for _, target in task.examples]))
        ids_BT = self.prepared.inputs["input_ids"]
        self.labels_BT = torch.full_like(ids_BT, IGNORED)
        self.labels_BT[:, -self.prepared.targets_BK.shape[1] :] = self.prepared.targets_BK

    def _state(self, name: str) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(self.several, adapter_name=name, save_embedding_layers=False)
        return {key: tensor.clone() for key, tensor in state.items()}

    @torch.no_grad()
    def original(self, values_E: np.ndarray) -> float:
        """One candidate as the published code does it: the mean loss over the batch's target tokens."""
        combined: dict[str, Tensor] = {}
        for weight, state in zip(values_E.tolist(), self.states.values(), strict=True):
            for key, tensor in state.items():
                combined[key] = combined[key] + weight * tensor if key in combined else weight * tensor
        set_peft_model_state_dict(self.single, combined, adapter_name=self.first)
        return float(self.single(**self.prepared.inputs, labels=self.labels_BT).loss)

    def population(self) -> list[float]:
        return self.objective(self.candidates)

    def one_by_one(self) -> list[float]:
        return [self.objective([candidate])[0] for candidate in self.candidates]

    def original_loop(self) -> list[float]:
        return [self.original(values_E) for values_E in self.values_CE]

    @torch.no_grad()
    def gates(self) -> list[Gate]:
        together, apart = (torch.tensor(losses) for losses in (self.population(), self.one_by_one()))
        mix_in_peft(self.several, self.candidates[0].as_dict())
        by_peft = self._mean_over_rows(self.several.get_base_model())
        by_population = torch.tensor(self.objective.scores(self.candidates)[0][0]).mean()
        original = torch.tensor(self.original(self.values_CE[0]))
        with self.engine.fused(self.candidates[0].as_dict(), method="factor_sum"):
            num_targets = (self.prepared.targets_BK != IGNORED).sum()
            factor_sum = token_losses(self.engine.model, self.prepared).sum() / num_targets
        return [
            Gate("a population's losses equal those of one candidate a forward", difference(together, apart), LIMIT),
            Gate("a population's loss equals peft's with 20 active adapters", difference(by_population, by_peft), LIMIT),
            Gate("the original loop's loss equals that of factor_sum", difference(original, factor_sum), LIMIT),
        ]

    def _mean_over_rows(self, model: Any) -> Tensor:
        counts_B = (self.prepared.targets_BK != IGNORED).sum(dim=1)
        return (token_losses(model, self.prepared).sum(dim=1) / counts_B).mean()


def main(
    task: Annotated[str, typer.Option(help="of examples/data/unseen")] = "negated_passive",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the base model and the factors")] = "float32",
    original_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="of the model in the original loop")
    ] = "float32",
    rounds: Annotated[int, typer.Option(help="at most so many rounds")] = 15,
    seconds: Annotated[float, typer.Option(help="no round that would end later")] = 60.0,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="count processor time, for one thread on a busy machine")] = False,
    seed: Annotated[int, typer.Option(help="of the examples and the candidates")] = 0,
) -> None:
    """Evaluations a second relative to the original loop."""
    torch.set_num_threads(threads)
    model, tokenizer = base_model()
    unseen = load_task(DATA, task, seed, num_test=0)
    search = Search(model, tokenizer, unseen.task, seed)
    require(search.gates())
    model.to(getattr(torch, dtype))
    search.single.to(getattr(torch, original_dtype))
    for name, state in search.states.items():
        search.states[name] = {key: tensor.to(getattr(torch, original_dtype)) for key, tensor in state.items()}
    ways = {
        f"original LoraHub loop in peft, {original_dtype}": Way(search.original_loop, work=POPULATION),
        "loraweave, one candidate a forward": Way(search.one_by_one, work=POPULATION),
        f"loraweave, populations of {POPULATION}": Way(search.population, work=POPULATION),
    }
    title = f"{task}, 20 adapters, {len(unseen.task.examples)} examples, ours in {dtype}, {threads} thread(s)"
    first = next(iter(ways))
    compare(
        title, ways, rounds=rounds, seconds=seconds, cpu=cpu, tables={"evaluations a second, original = 1": (first, True)}
    )


if __name__ == "__main__":
    typer.run(main)
