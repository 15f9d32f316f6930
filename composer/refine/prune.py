"""Adapters that do not matter are left out: those without which the loss on the examples hardly rises."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.composer.introspection.leave_one_out import leave_one_out as left_out_of_engine
from loraweave.composer.refine.measured import example_loss, renewed, weighed_pool
from loraweave.errors import WeightingError
from loraweave.hub.progress import tracked
from loraweave.routers.mixture import MixtureWeights

if TYPE_CHECKING:
    from loraweave.composer.composition import Composition


def leave_one_out(composition: Composition) -> dict[str, float]:
    """By how much the mean loss of the examples rises without each adapter, the others' weights as they are.

    Negative where the composition is better without it. All are measured in one pass, with a mixture per row; where a router
    weighs, in a pass for each, and the others' weights are what it gives them.
    """
    if composition.router is not None:
        return left_out_of_engine(composition.engine, composition.task, composition.router)
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
