"""Conversion of fine-tunes, and of adapters with parts that depend on the base (DoRA, (IA)3, a bias), to plain LoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_id, base_key, fingerprint, require_model, require_same_base
from loraweave.hub.base_layer import BaseLayer, as_base_layer, base_layer
from loraweave.hub.formats._contents import MAX_ERROR, Bound, Dense, cut_update
from loraweave.hub.formats._files import listing, present
from loraweave.hub.formats._safetensors import read_tensors, require_finite, shards
from loraweave.lowrank import algebra
from loraweave.types import Factors


@torch.no_grad()
def to_lora(adapter: Adapter, model: nn.Module, *, rank: int | None = None, max_error: float = MAX_ERROR) -> Adapter:
    """Return the same adapter with nothing but low-rank factors and a bias in every layer.

    A gain g becomes the matrix diag(g) W; DoRA's magnitude first becomes the gain m / |W + b a| - 1, and a trained bias its
    difference to the base's. A layer's whole update is then cut to the smallest rank within `max_error` (Frobenius norm,
    relative to the update) and at most `rank`; `card["conversion"]` has rank and relative error of every layer that had such
    a part. DoRA's updates have full rank, so a small `max_error` gives a large adapter. Raises BaseModelMismatch for another
    base, LayerMismatch for a layer that it lacks, AdapterUnsupported for a larger error at `rank` or quantised weights of
    the base.
    """
    bound = Bound(rank, max_error)
    key = base_key(model)
    require_same_base(f"adapter {adapter.name!r}", adapter.base, key)
    modules = dict(model.named_modules())
    layers: dict[str, Factors] = {}
    notes: dict[str, Any] = {}
    for name, factors in adapter.layers.items():
        where = f"adapter {adapter.name!r}: layer {name!r}"
        if factors.bound and factors.gain_O is None:
            layers[name], note = cut_update(factors, bound, where)
            if layers[name].rank != factors.rank:
                notes[name] = note
            continue
        layer = base_layer(modules, name, f"adapter {adapter.name!r}")
        update = _whole(factors, layer, where)
        layers[name], notes[name] = cut_update(update, bound, where, layer)
    return replace(adapter, layers=layers, fingerprint=key.fingerprint, card={**adapter.card, "conversion": notes})


def _whole(factors: Factors, layer: BaseLayer, where: str) -> Factors | Dense:
    """Return the update with its gain multiplied out: factors if it has no gain or magnitude, else one dense matrix."""
    # a layer with only a trained bias is stored without its number of inputs
    inputs = factors.a_RI.shape[1] if factors.rank else layer.num_inputs
    shape = (factors.b_OR.shape[0], inputs, factors.kind)
    if shape != (layer.num_outputs, layer.num_inputs, layer.kind):
        raise LayerMismatch(
            f"{where}: the update has (O, I, kind) {shape}, but the model's {type(layer.module).__name__} has "
            f"{(layer.num_outputs, layer.num_inputs, layer.kind)}"
        )
    if not factors.rank:
        factors = replace(factors, a_RI=torch.zeros(0, inputs))
    bias_O = layer.bias_O if factors.base_bias_O is not None else None
    if factors.magnitude_O is None and factors.gain_O is None:
        # no part depends on the weight, which may be quantised
        return algebra.bind(factors, torch.zeros(0), bias_O)
    bound = algebra.bind(factors, layer.weight_OI, bias_O)
    delta_OI = bound.b_OR.double() @ bound.a_RI.double()
    if bound.gain_O is not None:
        delta_OI += bound.gain_O.double()[:, None] * layer.weight_OI
    return Dense(delta_OI, bound.bias_O)


WEIGHTS = "model.safetensors"
Progress = Callable[[int, int, str], None]


@torch.no_grad()
def extract(
    base_model: nn.Module,
    tuned_model: nn.Module | Mapping[str, Tensor] | str | Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    layers: Sequence[str] | None = None,
    others: Literal["error", "card", "heads"] = "error",
    name: str = "extracted",
    progress: Progress | None = None,
) -> Adapter:
    """Return the fine-tune minus its base as an adapter, layer by layer (SVD of the difference; LoRD, mergekit's extract).

    `tuned_model` is a model, its state dict, or a folder with model.safetensors (or shards), read one tensor at a time. Each
    changed linear layer gets the smallest rank within `max_error` (Frobenius norm, relative to its difference) and at most
    `rank`. With neither, `max_error` is 1e-3; with `rank` alone the error is reported, not bounded. A changed bias of a
    linear layer is kept exactly. `card["conversion"]` has rank and relative error of every layer.

    `layers`: module paths or their ends ("q_proj"); None takes all linear layers. `others` decides about changed parameters
    outside them (norms, embeddings, tied heads): "error" raises and names them, "card" leaves them out and lists their
    relative change under `card["not_extracted"]`, "heads" stores them whole as `adapter.heads`. After every parameter,
    `progress(done, total, parameter)` is called. Raises AdapterUnsupported if `rank` leaves an error above `max_error`, if
    others changed, or if nothing did; LayerMismatch for a missing parameter or another shape; AdapterCorrupt for values that
    are not finite.
    """
    bound = Bound(rank, MAX_ERROR if max_error is None and rank is None else max_error)
    if others not in ("error", "card", "heads"):
        raise AdapterUnsupported(f"others is {others!r}; known are 'error', 'card' and 'heads'")
    require_model(base_model)
    base = dict(base_model.named_parameters())
    places = _linear_parameters(base_model, layers)
    updates: dict[str, Factors] = {}
    notes: dict[str, Any] = {}
    left: dict[str, Any] = {}
    heads: dict[str, Tensor] = {}
    biases: list[tuple[BaseLayer, Tensor]] = []
    for done, (parameter, tensor) in enumerate(_tuned_parameters(tuned_model, base_model, base), start=1):
        change = _change(parameter, base[parameter], tensor)
        if change is not None:
            layer, part = places.get(parameter, (None, ""))
            if layer is None:
                size = float(base[parameter].detach().double().norm())
                # JSON has no infinity
                left[parameter] = float(change.norm()) / size if size else None
                if others == "heads":
                    heads[parameter] = tensor.detach().cpu().float().clone()
            elif part == "bias":
                biases.append((layer, change.float()))
            else:
                delta_OI = change.T if layer.transposed else change.flatten(1)
                updates[layer.name], notes[layer.name] = cut_update(Dense(delta_OI), bound, f"layer {layer.name!r}")
        if progress is not None:
            progress(done, len(base), parameter)
    if left and others == "error":
        raise AdapterUnsupported(_refusal(left, layers))
    factors = _with_biases(updates, biases, base_model, notes)
    if not factors:
        what = "only parameters outside the linear layers differ" if left else "no parameter differs"
        raise AdapterUnsupported(f"nothing to extract: {what} between the base model and the tuned one")
    card: dict[str, Any] = {"converted_from": "full fine-tune", "conversion": notes}
    if left and others == "card":
        card["not_extracted"] = left
    base_name = base_id(base_model)
    return Adapter(name, base_name, factors, fingerprint(base_model), card, heads)


def _linear_parameters(model: nn.Module, layers: Sequence[str] | None) -> dict[str, tuple[BaseLayer, str]]:
    """Map each parameter to (layer, "weight" or "bias"), for the wanted linear layers that share no weight."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    result: dict[str, tuple[BaseLayer, str]] = {}
    unused = set(layers or ())
    for name, module in model.named_modules():
        layer = as_base_layer(name, module)
        if layer is None or layer.kind != "linear":
            continue
        matched = {entry for entry in layers or () if name == entry or name.endswith(f".{entry}")}
        unused -= matched
        if (layers is not None and not matched) or users[id(module.weight)] > 1:
            continue
        result |= {f"{name}.{part}": (layer, part) for part, _ in module.named_parameters(recurse=False)}
    if unused:
        raise LayerMismatch(f"layers names {sorted(unused)[0]!r}, which is not a linear layer of the base model")
    return result


def _tuned_parameters(
    source: nn.Module | Mapping[str, Tensor] | str | Path, model: nn.Module, base: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tuned tensor) of every base parameter, in the source's order. Raises LayerMismatch if one is missing."""
    first = {id(parameter): name for name, parameter in base.items()}
    tied = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in model.named_buffers()}
    seen: set[str] = set()
    for name, tensor in _items(source):
        first_name = tied.get(name)
        if first_name is None and name not in buffers:
            raise LayerMismatch(f"the tuned model has the parameter {name!r}, which the base model does not have")
        if first_name is None or first_name in seen:
            continue
        seen.add(first_name)
        yield first_name, tensor
    if missing := sorted(set(base) - seen):
        raise LayerMismatch(f"the tuned model lacks {len(missing)} parameters of the base model, the first {missing[0]!r}")


def _items(source: nn.Module | Mapping[str, Tensor] | str | Path) -> Iterable[tuple[str, Tensor]]:
    match source:
        case nn.Module():
            return source.named_parameters(remove_duplicate=False)
        case Mapping():
            return source.items()
    folder = Path(source)
    if present(folder, WEIGHTS):
        files = [WEIGHTS]
    elif present(folder, f"{WEIGHTS}.index.json"):
        files = shards(folder, f"{WEIGHTS}.index.json")
    else:
        raise AdapterCorrupt(f"{folder}: no {WEIGHTS}; the folder holds {listing(folder)}")
    return ((key, tensor) for key, _, tensor in read_tensors(folder, files))


def _change(parameter: str, before: Tensor, after: Tensor) -> Tensor | None:
    """Return after - before in float64, or None if both tensors are equal."""
    if before.shape != after.shape:
        raise LayerMismatch(
            f"parameter {parameter!r} has shape {tuple(before.shape)} in the base model and "
            f"{tuple(after.shape)} in the tuned one"
        )
    for owner, tensor in (("base", before), ("tuned", after)):
        if tensor.is_meta or not tensor.is_floating_point():
            raise AdapterUnsupported(
                f"parameter {parameter!r} of the {owner} model is {tensor.dtype} on {tensor.device}; load it unquantised"
            )
    change = after.detach().cpu().double() - before.detach().cpu().double()
    require_finite(change, f"parameter {parameter!r}", "the difference")
    return change if bool(change.any()) else None


def _refusal(left: Mapping[str, Any], layers: Sequence[str] | None) -> str:
    shown = ", ".join(list(left)[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
    where = "the linear layers" if layers is None else f"the layers {list(layers)}"
    return (
        f"{len(left)} parameters outside {where} differ from the base model's: {shown}; others='heads' stores them whole, "
        "others='card' leaves them out and says so on the card"
    )


def _with_biases(
    updates: dict[str, Factors], biases: list[tuple[BaseLayer, Tensor]], model: nn.Module, notes: dict[str, Any]
) -> dict[str, Factors]:
    for layer, bias_O in biases:
        if layer.name not in updates:
            updates[layer.name] = Factors(torch.zeros(0, layer.num_inputs), torch.zeros(layer.num_outputs, 0))
            notes[layer.name] = {"rank": 0, "relative_error": 0.0}
        updates[layer.name] = replace(updates[layer.name], bias_O=bias_O)
    return {name: updates[name] for name, _ in model.named_modules() if name in updates}
