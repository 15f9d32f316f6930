"""One more domain or task for a trained mixture, whose others stay byte for byte what they are."""

from __future__ import annotations

from dataclasses import replace

import torch

from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.errors import WeightingError
from loraweave.routers.experts._recipe import ExpertShape, Site


def with_task(model: ExpertModel, task: str) -> ExpertModel:
    """The model with one more task, which has what the recipe gives a task (an expert, a row of a gate), untrained.

    All tensors of the others are the same bits. The given model is closed. Raises WeightingError for a task that it has.
    """
    wider = replace(model.recipe, tasks=(*model.recipe.tasks, task))
    shapes = {name: _wider(model, site, wider.shape(site)) for name, site in model.sites.items()}
    known, was_training = model.expert_state(), model.training
    model.close()
    made = ExpertModel(model.base_model, wider, tokenizer=model.tokenizer, shapes=shapes).train(was_training)
    with torch.no_grad():
        for name, value in made.expert_state().items():
            before = known[name]
            value[tuple(slice(0, size) for size in before.shape)] = before
    return made


def _wider(model: ExpertModel, site: Site, new: ExpertShape | None) -> ExpertShape:
    """The experts that the site has, and after them those that the recipe has for the new task."""
    own, before = model.shapes[site.name], model.recipe.shape(site)
    if new is None or before is None or new.ranks[: len(before.ranks)] != before.ranks:
        raise WeightingError(
            f"recipe {model.recipe.name!r} has other experts at {site.name!r} for one more task, not one more: train it anew"
        )
    return replace(own, ranks=own.ranks + new.ranks[len(before.ranks) :])
