"""A trainable mixture of LoRA experts by its recipe's name, or as it was saved in a folder; its experts from adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loraweave.registry as registry
from loraweave.common.checks import is_list, is_whole
from loraweave.composer.experts.expert_model import ExpertModel, require_expert_model
from loraweave.composer.experts.forms.sum_of_experts import SumOfExperts
from loraweave.composer.experts.parts import Start, shapes_of
from loraweave.composer.experts.parts import recipe as make_recipe
from loraweave.composer.experts.saving import FILE, FIRST_TENSORS, TENSORS, read_saved_experts
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.merge.arithmetic import clusters
from loraweave.composer.merge.merge import merge
from loraweave.errors import AdapterUnsupported, LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import require_model
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool, require_everywhere
from loraweave.hub.sources import find_folder
from loraweave.routers.recipes._recipe import ExpertShape, Recipe
from loraweave.types import Candidate


def experts(
    name: str | Path,
    base_model: nn.Module,
    *,
    tokenizer: Any = None,
    pool: Any = None,
    hub: Hub | None = None,
    **options: Any,
) -> ExpertModel:
    """Return the recipe of that name on a base model, untrained, or an expert model that was saved.

    Until it is trained it answers as the base does. A folder that `ExpertModel.save_pretrained` wrote, or `owner/name` on
    the model hub (with revision=, token=, local_files_only=), gives the saved model.

    With a `pool` the experts begin as its adapters, of whatever ranks, in the layers that these update: an ExpertPool,
    adapters, a mapping of names to adapters, a hub, the results of `hub.search`, or candidates of a Retriever with their
    `hub`. `num_experts` fewer than adapters begin as the means of that many groups of similar adapters (`lw.clusters`). A
    recipe's other experts begin as it says.

    `lw.names("experts")` are the recipes, whose options their classes document. Raises UnknownName, which names near misses,
    for an unknown recipe and for target_modules that match no layer, WeightingError for an unknown option, a value out of
    range and a value that is not a pool, LayerMismatch for a layer that cannot have experts, CompositionError for a value
    that is not a model; BaseModelMismatch for adapters of another base, AdapterUnsupported for those that
    are more than products of two factors, ScopeError for recipes whose experts are not; and what `ExpertModel.load` raises
    for a folder.
    """
    require_model(base_model)
    if not isinstance(name, str | Path):
        raise UnknownName(
            f"{name!r:.60} is no recipe's name and no folder; recipes are {', '.join(registry.names('experts'))}"
        )
    if isinstance(name, Path) or (name not in registry.names("experts") and ("/" in name or Path(name).is_dir())):
        wanted = {key: options.pop(key, None) for key in ("revision", "token", "local_files_only")}
        wanted["local_files_only"] = bool(wanted["local_files_only"])
        folder = find_folder(name, "an expert model", (FILE, TENSORS, FIRST_TENSORS), **wanted)
        return _saved(folder, base_model, tokenizer, options | ({} if pool is None else {"pool": pool}))
    if pool is not None:
        return start_from(name, base_model, pool, hub=hub, tokenizer=tokenizer, options=options).eval()
    # outside training, a model answers the same every time
    return ExpertModel(base_model, make_recipe(name, options), tokenizer=tokenizer).eval()


def _saved(folder: Path, base_model: nn.Module, tokenizer: Any, options: Mapping[str, Any]) -> ExpertModel:
    if options:
        raise WeightingError(f"{folder} has options of its own; {', '.join(options)} cannot be given again")
    saved = read_saved_experts(folder)
    saved.require_base(base_model)
    before: Mapping[str, Any] = registry.get("experts", saved.recipe).before
    made = make_recipe(saved.recipe, {**before, **saved.options})
    # what does not fit is found before memory is taken and the base is touched
    tensors = saved.tensors(base_model, made)
    model = ExpertModel(base_model, made, tokenizer=tokenizer, shapes=saved.shapes, names=saved.names)
    model.load_state_dict(tensors, strict=False)
    model.report = saved.report
    return model.eval()


FORM = "sum_of_experts"


def start_from(
    name: str, base_model: nn.Module, pool: Any, *, hub: Hub | None, tokenizer: Any, options: Mapping[str, Any]
) -> ExpertModel:
    """Return the recipe on the pool's layers, with experts that begin as its adapters; `lw.experts` documents `pool`."""
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
    # what the recipe's scale makes the adapter's update of
    starts: dict[str, list[Start | None]] = {site: [] for site in shapes}
    for site, of_site in starts.items():
        for factors in (adapter.layers.get(site) for adapter in members.adapters.values()):
            of_site.append(None if factors is None else (factors.a_RI.clone(), factors.b_OR.T / recipe.scale))
    return ExpertModel(base_model, recipe, tokenizer=tokenizer, shapes=shapes, starts=starts, names=members.names)


def _pool_of(pool: Any, hub: Hub | None) -> ExpertPool:
    """Return the values as a pool. Raises WeightingError for other values, and for candidates without their hub."""
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
            f"the pool has {strange[0]!r:.80}, which is no adapter: pass an ExpertPool, adapters, a mapping of names to "
            "adapters, a hub, or what hub.search found"
        )
    return ExpertPool(pool)


def _grouped(pool: ExpertPool, num_experts: Any, seed: int) -> ExpertPool:
    """Return the pool, or the means of `num_experts` groups of similar adapters."""
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
    """Raise AdapterUnsupported, naming expert and layer, for an update that is no product of two factors of a layer."""
    for name, adapter in pool.adapters.items():
        require_everywhere(name, adapter, "an expert model's experts count for every token")
        for layer, factors in adapter.layers.items():
            if factors.kind not in ("linear", "conv") or factors.gain_O is not None or factors.bias_O is not None:
                raise AdapterUnsupported(
                    f"expert {name!r} changes layer {layer!r} by more than a product of two factors ({factors.kind}), which "
                    "no trained expert begins as: leave it out of the pool"
                )


def _following(name: str, pool: ExpertPool, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for the number of experts: `num_experts`, or else the tasks, each with an expert of its own."""
    known = {field.name: field for field in fields(registry.get("experts", name))}
    if "num_experts" in known:
        return {"num_experts": (len(pool),) if isinstance(known["num_experts"].default, tuple) else len(pool)}
    return {"tasks": options.get("tasks", pool.names)}


def _by_task(recipe: Recipe, pool: ExpertPool) -> ExpertPool:
    """Return the pool in the order of the tasks if these have its names. Raises WeightingError if only some have."""
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
    """Return the ranks of the pool's adapters at a site, followed by those of the recipe's further experts."""
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


def put_expert(model: ExpertModel, expert: int, adapter: Adapter) -> ExpertModel:
    """Put the adapter in as the expert of that number, at weight 1; return the model.

    Layers that the adapter lacks are zero, and ranks below the expert's are filled with zeros. Raises LayerMismatch for
    layers where the model has no such expert, for other sizes and for a larger rank, UnknownName for a number that no expert
    has, ScopeError for a recipe whose experts are no updates, WeightingError for a value that is no adapter or expert
    model; the model is then as it was.
    """
    require_expert_model(model, "put_expert()")
    if not isinstance(adapter, Adapter):
        raise WeightingError(
            f"expert {expert!r} of recipe {model.recipe.name!r} would be {adapter!r:.60}, which is no adapter: give an "
            "Adapter, such as expert(number) of another model or one of a hub"
        )
    require_everywhere(adapter.name, adapter, "an expert model's experts count for every token")
    layers = layers_with(model, (expert,))
    if beyond := sorted(set(adapter.layers) - set(layers)):
        raise LayerMismatch(
            f"adapter {adapter.name!r} updates {beyond[0]!r}, which has no experts here: widen target_modules of recipe "
            f"{model.recipe.name!r}"
        )
    put = {name: _put_start(name, layer, expert, adapter) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.reset([put[name] if number == expert else start for number, start in enumerate(layer.starts())])
    return model


def layers_with(model: ExpertModel, experts: Iterable[int]) -> dict[str, SumOfExperts]:
    """Return the layers by name that have one of these experts, each a product of two factors of its own.

    Raises UnknownName for a number that no expert has, ScopeError for a recipe whose experts are no such products.
    """
    name, layers = model.recipe.name, model.named_layers()
    for layer in layers.values():
        if not layer.is_update:
            raise ScopeError(f"experts of recipe {name!r} are no updates of layers, and are not exchanged")
        if layer.shape.shared_a or layer.shape.shared_b or layer.shape.gains:
            raise ScopeError(
                f"experts of recipe {name!r} share a factor or have gains, so that none is exchanged without the others: "
                "take a recipe whose experts are products of two factors of their own"
            )
    for expert in experts:
        if not any(has_expert(layer, expert) for layer in layers.values()):
            raise UnknownName(f"recipe {name!r} has no expert {expert!r} in any layer")
    return {path: layer for path, layer in layers.items() if any(has_expert(layer, expert) for expert in experts)}


def has_expert(layer: SumOfExperts, expert: int) -> bool:
    """Return whether an expert of that number has a rank in this layer."""
    return is_whole(expert, 0) and expert < layer.shape.num_experts and layer.shape.ranks[expert] > 0


def _put_start(name: str, layer: SumOfExperts, expert: int, adapter: Adapter) -> Start:
    a_RI, b_RO = (torch.zeros_like(values) for values in layer.starts()[expert])
    if (factors := adapter.layers.get(name)) is None:
        return a_RI, b_RO
    sizes, limits = (factors.rank, factors.a_RI.shape[1], factors.b_OR.shape[0]), (*a_RI.shape, b_RO.shape[1])
    if factors.gain_O is not None or factors.bias_O is not None or sizes[1:] != limits[1:] or sizes[0] > limits[0]:
        raise LayerMismatch(
            f"adapter {adapter.name!r} has rank, inputs and outputs {sizes} at {name!r}, and expert {expert} takes "
            f"{limits}, or a smaller rank, and no gains or biases: make the recipe with that rank"
        )
    a_RI[: factors.rank] = factors.a_RI.to(a_RI)
    b_RO[: factors.rank] = factors.b_OR.T.to(b_RO) / layer.scale
    return a_RI, b_RO
