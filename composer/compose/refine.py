"""A composition as the best starting point of a few-shot LoRA (Asadi et al. 2024, arXiv 2402.15414, the second step)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraweave.common.display import tracked
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.report import ReportRow
from loraweave.composer.composer import Composer
from loraweave.composer.merge.arithmetic import byom
from loraweave.composer.train.adapters import train_adapters
from loraweave.errors import CompositionError, ScopeError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import Members
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router, Task

if TYPE_CHECKING:
    from loraweave.composer.compose.composition import Composition


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


def leave_one_out(composition: Composition) -> dict[str, float]:
    """By how much the mean loss of the examples rises without each adapter, the others' weights as they are.

    Negative where the composition is better without it. All are measured in one pass, with a mixture per row; where a router
    weighs, in a pass for each, and the others' weights are what it gives them.
    """
    if composition.router is not None:
        return composition.engine.leave_one_out(composition.task, composition.router, progress=False)
    pool, mixture = weighed_pool(composition, "leave adapters out of")
    objective = example_loss(composition, pool, composition.merge_method)
    whole, *losses = _losses(objective, [mixture, *(_without(mixture, [name]) for name in pool.names)])
    return {name: loss - whole for name, loss in zip(pool.names, losses, strict=True)}


def prune(composition: Composition, tolerance: float, *, progress: bool = True) -> Composition:
    """Leaves out adapters one by one, always the one that is missed least, while the loss rises by at most `tolerance`.

    `tolerance` is in nats of the mean loss on the examples, in all, and at least 0. One adapter stays.
    """
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise WeightingError(
            f"tolerance is {tolerance!r}; it is the rise of the loss that may be lost, a number of at least 0"
        )
    started = time.perf_counter()
    pool, mixture = weighed_pool(composition, "prune")
    objective = example_loss(composition, pool, composition.merge_method)
    (whole,) = _losses(objective, [mixture])
    out: list[str] = []
    loss, evaluations = whole, 1
    for _ in tracked(range(len(pool) - 1), "leaving adapters out", total=len(pool) - 1, shown=progress):
        left = [name for name in pool.names if name not in out]
        losses = _losses(objective, [_without(mixture, [*out, name]) for name in left])
        evaluations += len(left)
        # NaN, of a mixture that cannot be scored, is never the least
        least = min(range(len(left)), key=lambda place: (math.isnan(losses[place]), losses[place]))
        if not losses[least] <= whole + tolerance:
            break
        out.append(left[least])
        loss = losses[least]
    kept = _without(mixture, out)
    return renewed(
        composition,
        "pruned",
        f"{len(out)} of {len(pool)} adapters left out; loss {whole:.3f} became {loss:.3f}",
        loss=loss,
        seconds=time.perf_counter() - started,
        evaluations=evaluations,
        weights=kept.means(),
        by_layer=kept.by_layer() if kept.layers else None,
    )


def _without(mixture: MixtureWeights, names: list[str]) -> MixtureWeights:
    kept_E = torch.tensor([name not in names for name in mixture.experts])
    return MixtureWeights(mixture.values_BTLE * kept_E, mixture.experts, mixture.layers)


def _losses(objective: ExampleLoss, mixtures: list[MixtureWeights]) -> list[float]:
    return [float(losses_N.mean()) for losses_N in objective.scores(mixtures)[0]]


def cut(composition: Composition, rank: int) -> Composition:
    """Every layer's update at most of `rank`, the best approximation of the merged one in the Frobenius norm.

    The report's reason has the rank before, the relative error of all layers together, and the loss before and after.
    """
    if composition.is_base:
        raise CompositionError("cannot cut the rank of this composition: it is the base model itself")
    started = time.perf_counter()
    whole = composition.adapter
    smaller = replace(byom(whole, rank), name=whole.name)
    error = smaller.card["compression"]["relative_error"]
    before, after = adapter_loss(composition, whole), adapter_loss(composition, smaller)
    return renewed(
        composition,
        "cut",
        f"rank {whole.rank} became {smaller.rank}, relative error {error:.3f}; loss {before:.3f} became {after:.3f}",
        loss=after,
        seconds=time.perf_counter() - started,
        evaluations=2,
        weights=composition.all_weights,
        by_layer=composition.by_layer,
        stored=smaller,
    )


def weighed_pool(composition: Composition, verb: str) -> tuple[ExpertPool, MixtureWeights]:
    """The experts that have a weight, and the mixture over them.

    Raises CompositionError for a composition without a pool, and for one that is more than its weights say.
    """
    require_no_router(composition.router, verb)
    if composition.stored is not None or composition.pool is None:
        raise CompositionError(
            f"cannot {verb} a composition that was read from a folder, cut or tuned: only the merged adapter is left of it. "
            "Do it before, on what compose() returned"
        )
    if composition.is_base:
        raise CompositionError(f"cannot {verb} this composition: it is the base model itself")
    pool = composition.pool.subset(composition.mean_weights)
    weights = composition.weights
    return pool, weights if isinstance(weights, MixtureWeights) else MixtureWeights.of(composition.mean_weights, pool.names)


def example_loss(composition: Composition, pool: ExpertPool, merge_method: str) -> ExampleLoss:
    """The loss on the composition's own examples, without terms for the weights."""
    engine = Composer(composition.model, pool, tokenizer=composition.tokenizer)
    return ExampleLoss(engine, composition.tokenizer, composition.task, merge_method=merge_method, l1=0.0)


def adapter_loss(composition: Composition, adapter: Adapter | None) -> float:
    """The mean loss of the composition's examples with an adapter, or with the base model alone."""
    if adapter is None:
        losses = composition.losses()
    else:
        objective = example_loss(composition, ExpertPool({adapter.name: adapter}), "linear")
        losses = objective.scores([MixtureWeights.of({adapter.name: 1.0}, [adapter.name])])[0][0].tolist()
    return sum(losses) / len(losses)


def renewed(
    composition: Composition,
    name: str,
    reason: str,
    *,
    loss: float,
    seconds: float,
    evaluations: int,
    weights: Mapping[str, float],
    by_layer: Mapping[str, Mapping[str, float]] | None,
    num_trained: int = 0,
    **fields: Any,
) -> Composition:
    """The composition with other `fields`, by `name` in its report; what it does on held-out examples is not known."""
    row = ReportRow(name, weights, loss, None, None, seconds, evaluations, by_layer, num_trained)
    old = composition.report
    kept = tuple(other for other in old.rows if other.name != name)
    report = replace(
        old,
        rows=(*kept, row),
        chosen=name,
        reason=reason,
        seconds=old.seconds + seconds,
        evaluations=old.evaluations + evaluations,
    )
    return replace(composition, all_weights=weights, by_layer=by_layer, report=report, **fields)


def require_no_router(router: Router | None, verb: str) -> None:
    """Raises ScopeError where there is a router: its weights depend on the input, and `verb` needs some that do not."""
    if router is not None:
        raise ScopeError(
            f"a composition by router {router_name(router)!r} cannot {verb}: its weights depend on the input. It answers "
            "live, save_pretrained() keeps router and adapters, and engine.activate(composition.weights) does the same "
            "elsewhere; for weights that can be merged, compose() with a search"
        )


def pool_of(router: TokenRouter, engine: Composer) -> ExpertPool:
    """The engine's pool as it was given, or bound to the base, where only then it has what the router was made for."""
    wanted, given = set(router.members.hashes), set(Members.of(engine.pool).hashes)
    if wanted <= given or not wanted <= set(Members.of(engine.bound_pool).hashes):
        return engine.pool
    return engine.bound_pool


def saved_router(router: Router) -> TokenRouter:
    """The router, if it is of those that are written to files; else ScopeError."""
    if not isinstance(router, TokenRouter):
        raise ScopeError(
            f"router {router_name(router)!r} is none that loraweave can write to a file: routers of lw.router() are saved"
        )
    return router


def router_name(router: str | Router) -> str:
    """Its name in the registry, or of its class where it is in none; a name is its own."""
    if isinstance(router, str):
        return router
    return router.name if isinstance(router, TokenRouter) else type(router).__name__
