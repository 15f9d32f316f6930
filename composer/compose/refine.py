"""The ways to make a composition better or smaller afterwards: training on, cutting ranks, and leaving adapters out.

A merged adapter is the best starting point of a few-shot LoRA (Asadi et al. 2024, arXiv 2402.15414, the second step).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from loraweave.common.checks import is_number
from loraweave.common.display import progress_bar
from loraweave.common.options import Count, check_options
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.composer import Composer
from loraweave.composer.model import kinds, scoring
from loraweave.composer.model.batches import untouched
from loraweave.composer.train.adapters import train_adapters
from loraweave.composer.train.rows import shows_its_examples
from loraweave.errors import BudgetExceeded, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.lowrank import algebra
from loraweave.routers.tokens._members import Members
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task, with_pairs

# the cost of a training step in passes: forward, backward through the activations, and backward to the factors
STEP_COST = 3
# the layers of a new adapter, where no pool says otherwise
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Tuning:
    """The settings of a training that continues a merged adapter; each step sees up to `batch_size` examples.

    An adapter whose rank is above `rank` is cut to it before the first step.
    """

    steps: int = 10
    lr: float = 1e-3
    rank: int = 16
    batch_size: int = 8
    seed: int = 0


def tuned_adapters(
    model: Any,
    tokenizer: Any,
    task: Task,
    starts: Mapping[str, Adapter | None],
    examples: Mapping[str, Sequence[int]],
    tuning: Tuning,
    *,
    target_modules: Sequence[str] = TARGETS,
    checkpoint: Path | None = None,
    progress: bool | Progress = False,
) -> dict[str, Adapter]:
    """Train an adapter for each name of `examples`, on the examples of these indices, all together; return them by name.

    An adapter begins as the one of its name in `starts`, or, for None, as a new adapter of the layers whose paths end in
    `target_modules`. Raises BudgetExceeded if memory is too short.
    """
    begun = {
        name: start if start.rank <= tuning.rank else byom(start, tuning.rank)
        for name, start in starts.items()
        if start is not None
    }
    jobs = {name: task_of(task, chosen) for name, chosen in examples.items()}
    try:
        return train_adapters(
            model,
            tokenizer,
            jobs,
            start=begun,
            steps=tuning.steps,
            lr=tuning.lr,
            batch_size=min(tuning.batch_size, max(map(len, examples.values()))),
            jobs_per_batch=len(jobs),
            target_modules=target_modules,
            warmup=0,
            seed=tuning.seed,
            checkpoint=checkpoint,
            progress=progress,
        )
    except BudgetExceeded as error:
        raise BudgetExceeded(
            f"{error}. compose() takes no batch_size and no memory_bytes, and its method 'lorahub' trains no adapter"
        ) from error


def task_of(task: Task, seen: Sequence[int]) -> Task:
    """Return the task with the examples of these indices; if its prompts show its examples, they show the first of these."""
    examples = tuple([task.examples[index] for index in seen])
    shown = examples[: len(task.shown)] if shows_its_examples(task) else task.demonstrations
    return with_pairs(task, examples=examples, demonstrations=shown)


def byom(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter with every layer's b a cut to at most `rank` by its singular values: BYOM-LoRA (Jiang et al. 2023).

    The cut is the best approximation of each update at that rank; an update of that rank or less loses nothing. The card
    has the relative Frobenius error by layer and in all. Gains, biases, magnitudes (DoRA's, whose b a is cut) and heads
    stay. The result is an ordinary adapter of lower rank. Raises WeightingError for a rank below 1.
    """
    check_options("byom", {"rank": rank}, {"rank": Count})
    cuts = {layer: algebra.compress(factors, rank) for layer, factors in adapter.layers.items()}
    squares = {layer: algebra.norm(factors) ** 2 for layer, factors in adapter.layers.items()}
    lost, total = sum(cuts[layer][1] ** 2 * square for layer, square in squares.items()), sum(squares.values())
    errors = {
        "relative_error": (lost / total) ** 0.5 if total else 0.0,
        "layers": {layer: error for layer, (_, error) in cuts.items()},
    }
    recipe = {"method": "byom", "options": {"rank": rank}, "parents": [{"hash": adapter.hash, "name": adapter.name}]}
    # the parent's report is of how the parent was made
    card = {key: value for key, value in adapter.card.items() if key != "report"}
    layers = {layer: cut for layer, (cut, _) in cuts.items()}
    return replace(adapter, layers=layers, card={**card, "recipe": recipe, "compression": errors})


def num_scalars(adapter: Adapter) -> int:
    """Return the number of scalars in all of an adapter's factors a and b."""
    return sum(factors.a_RI.numel() + factors.b_OR.numel() for factors in adapter.layers.values())


def targets_of(pool: ExpertPool | None) -> Sequence[str]:
    """Return the endings of the paths of the linear layers that a pool's adapters update."""
    adapters = [] if pool is None else pool.adapters.values()
    linear = {layer for adapter in adapters for layer, factors in adapter.layers.items() if factors.kind == "linear"}
    return sorted({layer.rsplit(".", 1)[-1] for layer in linear}) or TARGETS


def linear_targets(model: Any) -> Sequence[str]:
    """Return the endings of the paths of a model's linear layers, without its head."""
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if kinds.linear.shape(module) and module is not head}
    return sorted({name.rsplit(".", 1)[-1] for name in linear})


def example_loss(
    model: Any, tokenizer: Any, task: Task, pool: ExpertPool, merge_method: str = "linear", *, turned: bool = False
) -> ExampleLoss:
    """Return an objective, the loss of mixtures of a pool on the task's examples, without terms for the weights."""
    engine = Composer(model, pool, tokenizer=tokenizer)
    return ExampleLoss(engine, tokenizer, task, merge_method=merge_method, turned=turned, l1=0.0)


def loss_with(model: Any, tokenizer: Any, task: Task, adapter: Adapter | None) -> float:
    """Return the mean loss of the examples with an adapter, or with the base model alone."""
    if adapter is None:
        with untouched(model):
            losses = scoring.losses(model, tokenizer, task, task.examples)
    else:
        alone = MixtureWeights.of({adapter.name: 1.0}, [adapter.name])
        objective = example_loss(model, tokenizer, task, ExpertPool({adapter.name: adapter}))
        losses = objective.scores([alone])[0][0].tolist()
    return sum(losses) / len(losses)


def rises_without_each(objective: ExampleLoss, mixture: MixtureWeights) -> dict[str, float]:
    """Return {expert: rise of the mean loss when it has the weight 0, and the others keep theirs}, measured in one pass."""
    whole, *losses = _losses(objective, [mixture, *(_without(mixture, [name]) for name in mixture.experts)])
    return {name: loss - whole for name, loss in zip(mixture.experts, losses, strict=True)}


@dataclass(frozen=True)
class Pruned:
    """A mixture in which the experts `left_out` have weight 0; the losses are means over the examples."""

    mixture: MixtureWeights
    left_out: list[str]
    loss_before: float
    loss: float
    evaluations: int


def prune_mixture(objective: ExampleLoss, mixture: MixtureWeights, tolerance: float, *, progress: bool = True) -> Pruned:
    """Leave out experts one by one, always the expert missed least, while the loss rises in all by at most `tolerance`.

    `tolerance` is in nats of the mean loss on the examples, and at least 0. One expert stays.
    """
    if not is_number(tolerance, 0):
        raise WeightingError(f"tolerance is {tolerance!r}; it is how much the loss may rise, a number of at least 0")
    (whole,) = _losses(objective, [mixture])
    out: list[str] = []
    loss, evaluations, rounds = whole, 1, len(mixture.experts) - 1
    with progress_bar(progress) as bar:
        for _ in bar.track(range(rounds), description="leaving adapters out"):
            left = [name for name in mixture.experts if name not in out]
            losses = _losses(objective, [_without(mixture, [*out, name]) for name in left])
            evaluations += len(left)
            # a mixture that cannot be scored has the loss NaN, which is never the least
            least = min(range(len(left)), key=lambda place: (math.isnan(losses[place]), losses[place]))
            if not losses[least] <= whole + tolerance:
                break
            out.append(left[least])
            loss = losses[least]
    return Pruned(_without(mixture, out), out, whole, loss, evaluations)


def _without(mixture: MixtureWeights, names: list[str]) -> MixtureWeights:
    kept_E = torch.tensor([name not in names for name in mixture.experts])
    return MixtureWeights(mixture.values_BTLE * kept_E, mixture.experts, mixture.layers)


def _losses(objective: ExampleLoss, mixtures: list[MixtureWeights]) -> list[float]:
    return [float(losses_N.mean()) for losses_N in objective.scores(mixtures)[0]]


def pool_of(router: TokenRouter, engine: Composer) -> ExpertPool:
    """Return the engine's bound pool if only that has all of the router's experts, else the engine's pool."""
    wanted, pool_hashes = set(router.members.hashes), set(Members.of(engine.pool).hashes)
    if wanted <= pool_hashes or not wanted <= set(Members.of(engine.bound_pool).hashes):
        return engine.pool
    return engine.bound_pool
