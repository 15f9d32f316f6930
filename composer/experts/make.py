"""A trainable mixture of LoRA experts by its recipe's name, or as it was saved in a folder; adapters as its experts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loraweave.registry as registry
from loraweave.common.checks import is_whole
from loraweave.composer.experts.expert_model import ExpertModel, require_expert_model, trainer
from loraweave.composer.experts.forms.sum_of_experts import SumOfExperts
from loraweave.composer.experts.parts import Start, make_recipe
from loraweave.composer.experts.saving import FILE, FIRST_TENSORS, TENSORS, read_saved_experts
from loraweave.errors import LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import require_model
from loraweave.hub.hub import Hub
from loraweave.hub.pool import require_everywhere
from loraweave.hub.sources import find_folder


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
    `hub`. `num_experts` fewer than adapters begin as the means of that many groups of similar adapters. A
    recipe's other experts begin as it says.

    `lw.names("experts")` are the recipes, whose options their classes document. Raises UnknownName, which names near misses,
    for an unknown recipe and for target_modules that match no layer, WeightingError for an unknown option, a value out of
    range and a value that is not a pool, LayerMismatch for a layer that cannot have experts, CompositionError for a value
    that is not a model; BaseModelMismatch for adapters of another base, AdapterUnsupported for those that are more than
    products of two factors, ScopeError for recipes whose experts are not, PackageMissing for a pool without the extension
    that trains experts; and what `ExpertModel.load` raises for a folder.
    """
    require_model(base_model)
    if not isinstance(name, str | Path):
        raise UnknownName(
            f"{name!r:.60} is neither a recipe's name nor a folder; recipes are {', '.join(registry.names('experts'))}"
        )
    if isinstance(name, Path) or (name not in registry.names("experts") and ("/" in name or Path(name).is_dir())):
        wanted = {key: options.pop(key, None) for key in ("revision", "token", "local_files_only")}
        wanted["local_files_only"] = bool(wanted["local_files_only"])
        folder = find_folder(name, "an expert model", (FILE, TENSORS, FIRST_TENSORS), **wanted)
        return _saved(folder, base_model, tokenizer, options | ({} if pool is None else {"pool": pool}))
    if pool is not None:
        begun: ExpertModel = trainer().start_from(name, base_model, pool, hub=hub, tokenizer=tokenizer, options=options)
        return begun.eval()
    # evaluation mode, without dropout and noise
    return ExpertModel(base_model, make_recipe(name, options), tokenizer=tokenizer).eval()


def _saved(folder: Path, base_model: nn.Module, tokenizer: Any, options: Mapping[str, Any]) -> ExpertModel:
    if options:
        raise WeightingError(f"{folder} has options of its own; {', '.join(options)} cannot be given again")
    saved = read_saved_experts(folder)
    saved.require_base(base_model)
    before: Mapping[str, Any] = registry.get("experts", saved.recipe).before
    made = make_recipe(saved.recipe, {**before, **saved.options})
    # tensors that do not fit raise here, before memory is taken and the base is changed
    tensors = saved.tensors(base_model, made)
    model = ExpertModel(base_model, made, tokenizer=tokenizer, shapes=saved.shapes, names=saved.names)
    model.load_state_dict(tensors, strict=False)
    model.report = saved.report
    return model.eval()


def put_expert(model: ExpertModel, expert: int, adapter: Adapter) -> ExpertModel:
    """Put the adapter in as the expert with index `expert`, at weight 1; return the model.

    Layers that the adapter lacks are zero, and ranks below the expert's are filled with zeros. Raises LayerMismatch for
    layers where the model has no such expert, for other sizes and for a larger rank, UnknownName for a number that no expert
    has, ScopeError for a recipe whose experts are not updates, WeightingError for a value that is not an adapter or expert
    model; the model is then as it was.
    """
    require_expert_model(model, "put_expert()")
    if not isinstance(adapter, Adapter):
        raise WeightingError(
            f"expert {expert!r} of recipe {model.recipe.name!r} would be {adapter!r:.60}, not an adapter: give an "
            "Adapter, such as expert(number) of another model or one of a hub"
        )
    require_everywhere(adapter.name, adapter, "an expert model's experts act on every token")
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
    """Return {path: layer} of the layers in which any of these experts (indices) has a rank.

    Raises UnknownName for a number without an expert, ScopeError for a recipe whose experts are not products of two factors
    of their own.
    """
    name, layers = model.recipe.name, model.named_layers()
    for layer in layers.values():
        if not layer.is_update:
            raise ScopeError(f"experts of recipe {name!r} are not updates of layers, so none can be put in")
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
    """Return True if the expert with this number has a rank above 0 in the layer."""
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
