"""The start of an expert model's experts as stored adapters."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from loraweave import (
    Adapter,
    AdapterUnsupported,
    Candidate,
    ExpertPool,
    Hub,
    ScopeError,
    WeightingError,
    merge,
)
from loraweave.extend import get, is_list, is_whole
from loraweave.extend.hubs import require_everywhere
from loraweave.extend.live import Fitting
from loraweave.extend.recipes import ExpertModel, ExpertShape, Recipe, make_recipe, shapes_of
from loraweave.extensions.expert_training.grouping import clusters

FORM = "sum_of_experts"


def start_from(
    name: str, base_model: nn.Module, pool: Any, *, hub: Hub | None, tokenizer: Any, options: Mapping[str, Any]
) -> ExpertModel:
    """Return an expert model of the recipe `name` on the pool's layers, whose experts begin as the pool's adapters.

    `lw.experts` documents `pool`; `options` are the recipe's.
    """
    if "target_modules" in options:
        raise WeightingError(
            "target_modules cannot be given with a pool: the layers that get experts are those of its adapters"
        )
    num_experts = options.get("num_experts")
    members = _grouped(_pool_of(pool, hub), num_experts, options.get("seed", 0))
    # each adapter is compared with the model before it is touched
    members = Fitting(base_model).pool(members)
    _require_updates(members)
    recipe = make_recipe(name, {**options, **_following(name, members, options), "target_modules": members.layer_names})
    members = members if "num_experts" in recipe.options else _by_task(recipe, members)
    shapes = {site: _shape(recipe, site, shape, members) for site, shape in shapes_of(base_model, recipe).items()}
    # divided by the recipe's scale, so that the first update is the adapter's
    starts: dict[str, list[Any]] = {site: [] for site in shapes}
    for site, of_site in starts.items():
        for factors in (adapter.layers.get(site) for adapter in members.adapters.values()):
            of_site.append(None if factors is None else (factors.a_RI.clone(), factors.b_OR.T / recipe.scale))
    return ExpertModel(base_model, recipe, tokenizer=tokenizer, shapes=shapes, starts=starts, names=members.names)


def _pool_of(pool: Any, hub: Hub | None) -> ExpertPool:
    """Return the caller's `pool`, in any form that `lw.experts` takes, as an ExpertPool.

    Raises WeightingError for values that are not adapters, and for candidates of a search without their hub.
    """
    hub = getattr(pool, "hub", None) if hub is None else hub
    match pool:
        case ExpertPool():
            return ExpertPool({name: pool[name] for name in pool.names}) if pool.lazy else pool
        case Hub():
            return pool.pool([record.name for record in pool])
        case Mapping():
            members = list(pool.values())
        case Iterable():
            members = pool = list(pool)
        case _:
            members = pool = [pool]
    if members and is_list(members, Candidate):
        if hub is None:
            raise WeightingError(
                "the pool is what a search found, whose adapters are in a hub: pass hub=... beside pool=..."
            )
        return hub.pool([candidate.name for candidate in members])
    if strange := [member for member in members if not isinstance(member, Adapter)]:
        raise WeightingError(
            f"the pool has {strange[0]!r:.80}, not an adapter: pass an ExpertPool, adapters, a mapping of names to "
            "adapters, a hub, or what hub.search found"
        )
    return ExpertPool(pool)


def _grouped(pool: ExpertPool, num_experts: Any, seed: int) -> ExpertPool:
    """Return a pool of the means of `num_experts` groups of similar adapters; for None the pool itself."""
    if num_experts is None or num_experts == len(pool):
        return pool
    if not is_whole(num_experts, 1) or num_experts > len(pool):
        raise WeightingError(
            f"num_experts is {num_experts!r}, but the pool has {len(pool)} adapters: it is a whole number from 1 to that, "
            "or None for all of them"
        )
    merged = {}
    for names in clusters(pool, num_clusters=num_experts, seed=seed, progress=False):
        adapters, equal = [pool[name] for name in names], [1 / len(names)] * len(names)
        mean = adapters[0] if len(names) == 1 else merge(adapters, equal, method="linear", progress=False)
        merged["+".join(names)] = mean
    return ExpertPool(merged)


def _require_updates(pool: ExpertPool) -> None:
    """Raise AdapterUnsupported, naming expert and layer, for an update that is not a product of two factors of a layer."""
    for name, adapter in pool.adapters.items():
        require_everywhere(name, adapter, "an expert model's experts act on every token")
        for layer, factors in adapter.layers.items():
            if factors.kind not in ("linear", "conv") or factors.gain_O is not None or factors.bias_O is not None:
                raise AdapterUnsupported(
                    f"expert {name!r} changes layer {layer!r} by more than a product of two factors ({factors.kind}), which "
                    "no trained expert begins as: leave it out of the pool"
                )


def _following(name: str, pool: ExpertPool, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option that gives recipe `name` as many experts as the pool has, {"num_experts" or "tasks": value}."""
    known = {field.name: field for field in fields(get("experts", name))}
    if "num_experts" in known:
        return {"num_experts": (len(pool),) if isinstance(known["num_experts"].default, tuple) else len(pool)}
    return {"tasks": options.get("tasks", pool.names)}


def _by_task(recipe: Recipe, pool: ExpertPool) -> ExpertPool:
    """Return the pool in the order of the recipe's tasks if its names are theirs, else unchanged.

    Raises WeightingError if an adapter with a task's name has another index than that task.
    """
    if set(recipe.tasks) == set(pool.names):
        return ExpertPool({task: pool[task] for task in recipe.tasks})
    for place, task in enumerate(recipe.tasks):
        if task in pool.names and pool.names.index(task) != place:
            raise WeightingError(
                f"task {task!r} of recipe {recipe.name!r} has place {place}, but the adapter of that name is at "
                f"{pool.names.index(task)} in the pool, and would be another task's: give pool and tasks in one order"
            )
    return pool


def _shape(recipe: Recipe, site: str, own: ExpertShape, pool: ExpertPool) -> ExpertShape:
    """Return the shape of the experts at a site: the ranks of the pool's adapters, then of the recipe's further experts.

    `own` is the recipe's shape there. Raises ScopeError or WeightingError for a recipe whose experts cannot be adapters.
    """
    if recipe.form != FORM or own.shared_a or own.shared_b or own.gains:
        raise ScopeError(
            f"the experts of recipe {recipe.name!r} are not each a product of two factors of its own, and cannot begin as "
            "adapters: take another recipe, or train it from the start, without a pool"
        )
    if own.num_experts < len(pool):
        raise WeightingError(
            f"recipe {recipe.name!r} has {own.num_experts} experts at {site!r}, but the pool has {len(pool)} adapters: "
            "change what their number follows from"
        )
    ranks = tuple(adapter.layers[site].rank if site in adapter.layers else 0 for adapter in pool.adapters.values())
    return ExpertShape(ranks + own.ranks[len(pool) :])
