"""A trainable mixture of LoRA experts by its recipe's name, or as it was saved in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from loraweave import registry
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.errors import WeightingError
from loraweave.routers.experts._recipe import Recipe


def experts(name: str | Path, base_model: nn.Module, *, tokenizer: Any = None, **options: Any) -> ExpertModel:
    """The recipe of that name on a base model, untrained: until it is trained it answers as the base does.

    `lw.names("experts")` are the recipes, whose options their classes document. Raises UnknownName, which names near misses,
    for no recipe's name and for target_modules that match no layer, WeightingError for an option that the recipe has not, or
    whose value is out of its range, LayerMismatch for a layer that cannot have experts.
    """
    # what is not being trained answers alike every time
    return ExpertModel(base_model, recipe(str(name), options), tokenizer=tokenizer).eval()


def recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of that name with these options; lists are taken for tuples."""
    made_of: type[Recipe] = registry.get("experts", name)
    known = [field.name for field in fields(made_of)]
    for option in options:
        if option not in known:
            close = registry.nearest(option, known)
            raise WeightingError(f"recipe {name!r} has no option {option!r}{close}; it has {', '.join(known)}")
    given: dict[str, Any] = {
        option: tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value
        for option, value in options.items()
    }
    return made_of(**given)
