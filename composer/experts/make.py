"""A trainable mixture of LoRA experts by its recipe's name, or as it was saved in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from loraweave import registry
from loraweave.composer.a_model import require_model
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.recipes import recipe
from loraweave.composer.experts.saving import read_saved_experts
from loraweave.composer.experts.start_from import start_from
from loraweave.errors import UnknownName, WeightingError
from loraweave.hub.hub import Hub


def experts(
    name: str | Path,
    base_model: nn.Module,
    *,
    tokenizer: Any = None,
    pool: Any = None,
    hub: Hub | None = None,
    **options: Any,
) -> ExpertModel:
    """The recipe of that name on a base model, untrained: until it is trained it answers as the base does. Or, for a folder
    that `ExpertModel.save_pretrained` wrote, what was saved.

    With a `pool` the experts begin as its adapters, of whatever ranks, in the layers that these update: an ExpertPool,
    adapters, a mapping of names to adapters, a hub, what `hub.search` found, or candidates of a Retriever with their `hub`.
    `num_experts` fewer than adapters begin as the means of so many groups of alike ones (`lw.clusters`). Experts that a
    recipe has besides begin as it says.

    `lw.names("experts")` are the recipes, whose options their classes document. Raises UnknownName, which names near misses,
    for no recipe's name and for target_modules that match no layer, WeightingError for an option that the recipe has not, or
    whose value is out of its range, or for what is no pool, LayerMismatch for a layer that cannot have experts,
    CompositionError for what is no model; BaseModelMismatch for adapters of another base, AdapterUnsupported for those that
    are more than products of two factors, ScopeError for recipes whose experts are not; and what `ExpertModel.load` raises
    for a folder.
    """
    require_model(base_model)
    if not isinstance(name, str | Path):
        raise UnknownName(
            f"{name!r:.60} is no recipe's name and no folder; recipes are {', '.join(registry.names('experts'))}"
        )
    if isinstance(name, Path) or (name not in registry.names("experts") and Path(name).is_dir()):
        return _saved(Path(name), base_model, tokenizer, options | ({} if pool is None else {"pool": pool}))
    if pool is not None:
        return start_from(name, base_model, pool, hub=hub, tokenizer=tokenizer, options=options).eval()
    # what is not being trained answers alike every time
    return ExpertModel(base_model, recipe(name, options), tokenizer=tokenizer).eval()


def _saved(folder: Path, base_model: nn.Module, tokenizer: Any, options: Mapping[str, Any]) -> ExpertModel:
    if options:
        raise WeightingError(f"{folder} has options of its own; {', '.join(options)} cannot be given again")
    saved = read_saved_experts(folder)
    saved.require_base(base_model)
    made = recipe(saved.recipe, saved.options)
    # what does not fit is found before memory is taken and the base is touched
    tensors = saved.tensors(base_model, made)
    model = ExpertModel(base_model, made, tokenizer=tokenizer, shapes=saved.shapes, names=saved.names)
    model.load_state_dict(tensors, strict=False)
    model.report = saved.report
    return model.eval()
