"""A trained mixture with changed options of its recipe, or with one more task: its learned tensors stay, bit for bit.

`federated_average` gives clients of a federation the means of their experts and gates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraweave import LayerMismatch, WeightingError
from loraweave.extend import is_list, is_number, require_known
from loraweave.extend.recipes import (
    ExpertModel,
    ExpertShape,
    Recipe,
    SumOfExperts,
    has_expert,
    layers_with,
    require_expert_model,
    shapes_of,
)


def with_task(model: ExpertModel, task: str) -> ExpertModel:
    """Return the model with one more task, whose expert or gate row, whichever the recipe has by task, is untrained.

    All other tensors keep their bits. The given model is closed. Raises WeightingError for a task that it has, and for
    anything but an expert model.
    """
    require_expert_model(model, "with_task()")
    return with_options(model, tasks=(*model.tasks, task))


def with_options(model: ExpertModel, **options: Any) -> ExpertModel:
    """Return a model with these options of the recipe changed, which keeps the tensors that the given model has learned.

    Experts and rows of gates that are new, or have another rank, are untrained. Parameters frozen by hand stay frozen. The
    given model is closed. Raises WeightingError for anything but an expert model, for options that the recipe lacks or whose
    values are out of range, for tasks at another index than before, for experts that would go, and if tensors of both models
    have shapes that do not fit; the model then stays as it was.
    """
    require_expert_model(model, "with_options()")
    recipe = model.recipe
    require_known(f"recipe {recipe.name!r}", options, recipe.options)
    other = replace(recipe, **options)
    if other.tasks[: len(recipe.tasks)] != recipe.tasks:
        raise WeightingError(
            f"tasks of recipe {recipe.name!r} are {recipe.tasks} and cannot become {other.tasks}: what a task has "
            "learned is stored by its index, so new tasks go to the end"
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
    """Return {site: shape of its experts under the recipe `other`}, with the model's ranks where no option changes them."""
    before, after = shapes_of(model.base_model, model.recipe), shapes_of(model.base_model, other)
    if gone := sorted(set(model.sites) - set(after)):
        raise WeightingError(f"{gone[0]!r} would lose its experts and what they learned: make a new model")
    return {
        name: _expert_shape(name, model, before.get(name), other, new) if name in model.sites else new
        for name, new in after.items()
        if name in model.sites or name not in before
    }


def _expert_shape(site: str, model: ExpertModel, before: ExpertShape | None, other: Recipe, new: ExpertShape) -> ExpertShape:
    """Return `new`, a site's shape under the recipe `other`, with the model's ranks where the options change none.

    `before` is the site's shape by the model's recipe, None if that gives it no experts.
    """
    if before is None:
        return new
    shape, place = model.shapes[site], model.sites[site]
    known = dict(zip(model.recipe.roles(place, shape), zip(before.ranks, shape.ranks, strict=False), strict=False))
    ranks = []
    for role, rank in zip(other.roles(place, new), new.ranks, strict=True):
        old, kept = known.get(role, (None, rank))
        ranks.append(kept if old == rank else rank)
    return replace(new, ranks=tuple(ranks))


@torch.no_grad()
def _take_over(model: ExpertModel, made: ExpertModel) -> None:
    known, old_layers, by_expert = model.expert_state(), dict(model.layers.items()), []
    for key, layer in made.layers.items():
        old = old_layers.get(key)
        if isinstance(layer, SumOfExperts) and isinstance(old, SumOfExperts):
            by_expert += [f"layers.{key}.{name}" for name in layer.of_starts]
            old_starts = dict(zip(model.recipe.roles(old.site, old.shape), old.starts(), strict=True))
            roles = made.recipe.roles(layer.site, layer.shape)
            if gone := [role for role in old_starts if role not in roles]:
                raise WeightingError(
                    f"expert {gone[0]!r} at {layer.site.name!r} and what it learned would be lost: make a new model"
                )
            # an expert that has another rank now begins untrained
            starts = dict(zip(roles, layer.starts(), strict=True))
            starts |= {role: start for role, start in old_starts.items() if len(start[0]) == len(starts[role][0])}
            layer.reset(list(starts.values()))
    for name, value in made.expert_state().items():
        if name in by_expert or name not in known:
            continue
        old_sizes, sizes = tuple(known[name].shape), tuple(value.shape)
        if len(old_sizes) != len(sizes) or any(old > new for old, new in zip(old_sizes, sizes, strict=True)):
            raise WeightingError(
                f"{name!r} is {old_sizes} and would be {sizes}, too small for all that was learned: make a new model"
            )
        value[tuple(slice(0, size) for size in old_sizes)] = known[name]


def federated_average(
    models: Sequence[ExpertModel], sizes: Sequence[float], *, experts: Sequence[int] = (), gates: bool = False
) -> None:
    """Replace shared parts of clients' models by their mean, weighted by the clients' data: FedAvg (McMahan et al. 2017).

    The factors a and b of the `experts` are averaged apart, with each client's scale in b; with `gates` the gates'
    parameters are averaged, too. The rest of a client stays as it is, and clients may have different bases where these
    layers are alike. Raises LayerMismatch for clients whose experts or gates differ in place or size, WeightingError for
    sizes that are negative or all 0; the models are then unchanged.
    """
    if not is_list(models) or not models:
        raise WeightingError(f"clients are {models!r:.60}: give a list of the expert models of all")
    for model in models:
        require_expert_model(model, "federated_average()")
    amounts: list[Any] = list(sizes) if isinstance(sizes, Iterable) else []
    are_amounts = all(is_number(amount, 0) for amount in amounts)
    if len(amounts) != len(models) or not are_amounts or not sum(amounts):
        raise WeightingError(f"sizes {sizes!r:.60} are not {len(models)} amounts of data, 0 or more, one for each client")
    shares = [amount / sum(amounts) for amount in amounts]
    clients = [layers_with(model, experts) if experts else {} for model in models]
    have = [
        {name: [expert for expert in experts if has_expert(layer, expert)] for name, layer in sorted(layers.items())}
        for layers in clients
    ]
    _require_same(models, "the layers with these experts", have)
    means: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for name, expert in ((name, expert) for name, in_layer in have[0].items() for expert in in_layer):
        of_all = [client[name].starts()[expert] for client in clients]
        _require_same(models, f"expert {expert} at {name!r}", [tuple(a.shape + b.shape) for a, b in of_all])
        scaled = [b * client[name].scale for (_, b), client in zip(of_all, clients, strict=True)]
        means[name, expert] = _mean([a for a, _ in of_all], shares), _mean(scaled, shares)
    learned = [dict(model.gates.named_parameters()) for model in models] if gates else []
    _require_same(models, "the gates", [{name: tuple(value.shape) for name, value in named.items()} for named in learned])
    gate_means = {name: _mean([named[name] for named in learned], shares) for name in (learned[0] if learned else ())}
    for client in clients:
        for name, layer in client.items():
            starts = layer.starts()
            for expert in have[0][name]:
                a_RI, b_RO = means[name, expert]
                starts[expert] = (a_RI, b_RO / layer.scale)
            layer.reset(starts)
    for parameters in learned:
        for name, value in parameters.items():
            value.data.copy_(gate_means[name])


def _require_same(models: Sequence[ExpertModel], what: str, values: Sequence[object]) -> None:
    for number, client_value in enumerate(values):
        if client_value != values[0]:
            raise LayerMismatch(
                f"{what} of client {number} ({models[number].recipe.name}) are {str(client_value)[:200]}, but those of "
                f"client 0 {str(values[0])[:200]}: clients exchange what all have alike"
            )


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value.detach().double().cpu() for value, share in zip(tensors, shares, strict=True)]).sum(
        dim=0
    )
