"""A trainable mixture of LoRA experts by its recipe's name, or as it was saved in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from loraweave import registry
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.saving import read_saved_experts
from loraweave.errors import WeightingError
from loraweave.routers.experts._recipe import Recipe


def experts(name: str | Path, base_model: nn.Module, *, tokenizer: Any = None, **options: Any) -> ExpertModel:
    """The recipe of that name on a base model, untrained: until it is trained it answers as the base does. Or, for a folder
    that `ExpertModel.save_pretrained` wrote, what was saved.

    `lw.names("experts")` are the recipes, whose options their classes document. Raises UnknownName, which names near misses,
    for no recipe's name and for target_modules that match no layer, WeightingError for an option that the recipe has not, or
    whose value is out of its range, LayerMismatch for a layer that cannot have experts; and what `ExpertModel.load` raises
    for a folder.
    """
    if isinstance(name, Path) or (name not in registry.names("experts") and Path(name).is_dir()):
        return _saved(Path(name), base_model, tokenizer, options)
    # what is not being trained answers alike every time
    return ExpertModel(base_model, recipe(name, options), tokenizer=tokenizer).eval()


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


def _saved(folder: Path, base_model: nn.Module, tokenizer: Any, options: Mapping[str, Any]) -> ExpertModel:
    if options:
        raise WeightingError(f"{folder} has options of its own; {', '.join(options)} cannot be given again")
    saved = read_saved_experts(folder)
    saved.require_base(base_model)
    made = recipe(saved.recipe, saved.options)
    # what does not fit is found before memory is taken and the base is touched
    tensors = saved.tensors(base_model, made)
    model = ExpertModel(base_model, made, tokenizer=tokenizer, shapes=saved.shapes)
    model.load_state_dict(tensors, strict=False)
    model.report = saved.report
    return model.eval()
