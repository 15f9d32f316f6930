"""What choosing weights for a task takes: `compose(method="auto")` against the whole of LoraHub's published recipe.

    python benchmarks/compose_time.py --task pick_verb_5 --threads 2

20 adapters of the example pool and 5 examples. The published recipe makes 40 evaluations in peft, one at a time: state dicts
copied, combined and loaded, a forward pass with all logits, asked for by nevergrad. "auto" measures base, every adapter and
the uniform mixture, learns weights of each layer on two folds and then on all examples, and guards. Both run on one model in
one dtype. Retrieval, which the recipe does without, is left out; benchmarks/unseen.py has it in its times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from _adapters import adapters, base_model
from _ratios import Way, compare
from search import DATA, Search

import loraweave as lw
from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.demo import load_task
from loraweave.routers.lorahub_original import LorahubOriginal


def main(
    task: Annotated[str, typer.Option(help="of the unseen tasks in --data")] = "pick_verb_5",
    data: Annotated[Path, typer.Option(help="a folder with tasks, as examples/data")] = DATA,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the base model in all ways")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="at most so many rounds")] = 5,
    seconds: Annotated[float, typer.Option(help="no round that would end later")] = 120.0,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="count processor time, for one thread on a busy machine")] = False,
    seed: Annotated[int, typer.Option(help="of the examples and the searches")] = 0,
) -> None:
    """Time to choose weights, relative to the published recipe in peft."""
    torch.set_num_threads(threads)
    model, tokenizer = base_model()
    unseen = load_task(data, task, seed, num_test=0).task
    experts = adapters(model, "qv", seed)
    search = Search(model, tokenizer, unseen, experts, 1, seed)
    kind = getattr(torch, dtype)
    model.to(kind)
    search.single.to(kind)
    search.states = {name: {key: t.to(kind) for key, t in state.items()} for name, state in search.states.items()}
    pool = lw.ExpertPool(experts)

    def published() -> None:
        solver = LorahubOriginal(pool.names, seed=seed)
        while not solver.stop():
            solver.tell([search.original(each.values_BTLE[0, 0, 0].double().numpy()) for each in solver.ask()])

    def recipe() -> None:
        solver = LorahubOriginal(pool.names, seed=seed)
        method = solver.merge_method
        solver.solve(ExampleLoss(lw.Composer(model, pool), tokenizer, unseen, kind=solver.loss, merge_method=method))

    def auto() -> None:
        lw.compose(model, tokenizer, pool, unseen, method="auto", seed=seed, progress=False)

    ways = {
        "LoraHub as published, in peft": Way(published),
        "the same recipe by loraweave": Way(recipe),
        'compose(method="auto")': Way(auto),
    }
    title = f"{task}, 20 adapters, {len(unseen.examples)} examples, {dtype}, {threads} thread(s)"
    first = next(iter(ways))
    compare(title, ways, rounds=rounds, seconds=seconds, cpu=cpu, tables={"time, as published = 1": (first, False)})


if __name__ == "__main__":
    typer.run(main)
