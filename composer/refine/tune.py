"""A composition as the best starting point of a few-shot LoRA (Asadi et al. 2024, arXiv 2402.15414, the second step)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraweave.composer.compression import byom
from loraweave.composer.refine.measured import adapter_loss, renewed
from loraweave.composer.training.train_adapters import train_adapters
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Task

if TYPE_CHECKING:
    from loraweave.composer.composition import Composition

# forward, backward by the activations and backward by the factors
STEP_COST = 3
# of a new adapter, where no pool says otherwise
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Tuning:
    """How a merged adapter is trained on: each step sees all examples, up to `batch_size` of them.

    `rank` is the most that the adapter to begin with may have; a higher one is cut first.
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
    progress: bool = False,
) -> dict[str, Adapter]:
    """{name: adapter} trained on some of the task's examples each, all in one batch; None begins a new adapter.

    `target_modules` are for new adapters.
    """
    begun = {
        name: start if start.rank <= tuning.rank else byom(start, tuning.rank)
        for name, start in starts.items()
        if start is not None
    }
    jobs = {name: replace(task, examples=[task.examples[index] for index in chosen]) for name, chosen in examples.items()}
    return train_adapters(
        model,
        tokenizer,
        jobs,
        start=begun,
        steps=tuning.steps,
        lr=tuning.lr,
        batch_size=min(tuning.batch_size, max(len(chosen) for chosen in examples.values())),
        jobs_per_batch=len(jobs),
        target_modules=target_modules,
        warmup=0,
        seed=tuning.seed,
        checkpoint=checkpoint,
        progress=progress,
    )


def tune(composition: Composition, tuning: Tuning, *, checkpoint: Path | None = None, progress: bool = True) -> Composition:
    """The merged adapter trained on all of the composition's examples; from nothing where it is the base model itself.

    A new adapter updates the linear layers that those of the pool update.
    """
    started = time.perf_counter()
    start = None if composition.is_base else composition.adapter
    before = adapter_loss(composition, start)
    everything = {"composition": range(len(composition.task.examples))}
    model, tokenizer, task = composition.model, composition.tokenizer, composition.task
    found = tuned_adapters(
        model,
        tokenizer,
        task,
        {"composition": start},
        everything,
        tuning,
        target_modules=targets_of(composition.pool),
        checkpoint=checkpoint,
        progress=progress,
    )["composition"]
    after = adapter_loss(composition, found)
    return renewed(
        composition,
        "tuned",
        f"{tuning.steps} steps on the examples from {composition.report.chosen}; loss {before:.3f} became {after:.3f}",
        loss=after,
        seconds=time.perf_counter() - started,
        evaluations=STEP_COST * tuning.steps + 2,
        weights=composition.all_weights,
        by_layer=composition.by_layer,
        num_trained=num_scalars(found),
        stored=found,
        tuned_steps=composition.tuned_steps + tuning.steps,
    )


def num_scalars(adapter: Adapter) -> int:
    """Of all its factors a and b."""
    return sum(factors.a_RI.numel() + factors.b_OR.numel() for factors in adapter.layers.values())


def targets_of(pool: ExpertPool | None) -> Sequence[str]:
    """What the paths of the linear layers of a pool's adapters end in."""
    adapters = [] if pool is None else pool.adapters.values()
    linear = {layer for adapter in adapters for layer, factors in adapter.layers.items() if factors.kind == "linear"}
    return sorted({layer.rsplit(".", 1)[-1] for layer in linear}) or TARGETS
