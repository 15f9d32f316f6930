"""Other options for a trained mixture, such as one more domain, while what it has stays byte for byte the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from loraweave import registry
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.forms.sum_of_experts import SumOfExperts
from loraweave.composer.experts.parts import Start, shapes_of
from loraweave.composer.experts.required import require_expert_model
from loraweave.errors import WeightingError
from loraweave.routers.experts._recipe import ExpertShape, Recipe

FACTORS = ("a_SI", "b_SO")


def with_task(model: ExpertModel, task: str) -> ExpertModel:
    """The model with one more task, which has what the recipe gives a task (an expert, a row of a gate), untrained.

    All tensors of the others are the same bits. The given model is closed. Raises WeightingError for a task that it has, and
    for what is no expert model.
    """
    require_expert_model(model, "with_task()")
    return with_options(model, tasks=(*model.tasks, task))


def with_options(model: ExpertModel, **options: Any) -> ExpertModel:
    """The model with these options of its recipe instead. Experts, and rows of gates, that it has are the same bits; those
    that are new, or have another rank, are untrained.

    What was frozen by hand stays so. The given model is closed. Raises WeightingError for what is no expert model, for
    options that the recipe has not, or whose values are out of range, for tasks in other places than they have, for experts
    that would go, and where tensors that both have do not fit into the new ones; the model then stays as it was.
    """
    require_expert_model(model, "with_options()")
    recipe = model.recipe
    for option in options:
        if option not in recipe.options:
            close = registry.nearest(option, list(recipe.options))
            raise WeightingError(
                f"recipe {recipe.name!r} has no option {option!r}{close}; it has {', '.join(recipe.options)}"
            )
    other = replace(recipe, **options)
    if other.tasks[: len(recipe.tasks)] != recipe.tasks:
        raise WeightingError(
            f"tasks of recipe {recipe.name!r} are {recipe.tasks} and would be {other.tasks}: what each has learned "
            "is at its place, so that new ones come after those there are"
        )
    shapes = _shapes(model, other)
    made = ExpertModel(model.base_model, other, tokenizer=model.tokenizer, shapes=shapes, names=model.names)
    try:
        _take_over(model, made)
    except WeightingError:
        made.close()
        raise
    made.set_again(model.set_by_hand())
    model.close()
    return made.train(model.training)


def _shapes(model: ExpertModel, other: Recipe) -> dict[str, ExpertShape]:
    """The experts of each site that the model has, or that the other options give experts alone."""
    before, after = shapes_of(model.base_model, model.recipe), shapes_of(model.base_model, other)
    if gone := sorted(set(model.sites) - set(after)):
        raise WeightingError(f"{gone[0]!r} would have no experts, and what they learned no place: make a new model")
    return {
        name: _shape(name, model, before.get(name), other, new) if name in model.sites else new
        for name, new in after.items()
        if name in model.sites or name not in before
    }


def _shape(site: str, model: ExpertModel, before: ExpertShape | None, other: Recipe, new: ExpertShape) -> ExpertShape:
    """The new experts, with the ranks that the site has where the options change nothing."""
    if before is None:
        return new
    own, place = model.shapes[site], model.sites[site]
    known = dict(zip(model.recipe.roles(place, own), zip(before.ranks, own.ranks, strict=False), strict=False))
    ranks = []
    for role, rank in zip(other.roles(place, new), new.ranks, strict=True):
        old, kept = known.get(role, (None, rank))
        ranks.append(kept if old == rank else rank)
    return replace(new, ranks=tuple(ranks))


@torch.no_grad()
def _take_over(model: ExpertModel, made: ExpertModel) -> None:
    known, by_expert = model.expert_state(), []
    for key, layer in made.layers.items():
        old = dict(model.layers.items()).get(key)
        if isinstance(layer, SumOfExperts) and isinstance(old, SumOfExperts):
            by_expert += [f"layers.{key}.{name}" for name in (*FACTORS, *(f"frozen_{name}" for name in FACTORS))]
            own = dict(zip(model.recipe.roles(old.site, old.shape), old.starts(), strict=True))
            roles = made.recipe.roles(layer.site, layer.shape)
            if gone := [role for role in own if role not in roles]:
                raise WeightingError(
                    f"expert {gone[0]!r} at {layer.site.name!r}, and what it learned, would have no place: make a new model"
                )
            layer.reset([_either(new, own.get(role)) for role, new in zip(roles, layer.starts(), strict=True)])
    for name, value in made.expert_state().items():
        if name in by_expert or name not in known:
            continue
        old_sizes, sizes = tuple(known[name].shape), tuple(value.shape)
        if len(old_sizes) != len(sizes) or any(old > new for old, new in zip(old_sizes, sizes, strict=True)):
            raise WeightingError(
                f"{name!r} is {old_sizes} and would be {sizes}, with no place for all that was learned: make a new model"
            )
        value[tuple(slice(0, size) for size in old_sizes)] = known[name]


def _either(new: Start, old: Start | None) -> Start:
    """What an expert was, unless it has another rank now."""
    return new if old is None or len(old[0]) != len(new[0]) else old
