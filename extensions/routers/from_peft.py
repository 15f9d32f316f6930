"""Routers that PEFT saved: the folder of its X-LoRA, and that of `create_arrow_model` (Arrow and GenKnowSub).

An X-LoRA's adapter_config.json names its adapters by paths of the machine that saved it. No such path is opened: the
adapters are those in the folders 0, 1, ... within, or the pool that is given, by the names there or in their order.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraweave import Adapter, AdapterCorrupt, AdapterUnsupported, ExpertPool, Factors, LoraweaveError, WeightingError
from loraweave.extend.formats import AdapterConfig, folder_within, parse_lora, require_finite, stored_tensors, words
from loraweave.extend.routing import TokenRouter, router_class
from loraweave.extensions.routers.to_peft import ARROW, FLAGS

MAX_EXPERTS, MAX_DEPTH = 10_000, 1_000
_CLASSIFIER = re.compile(r"internal_xlora_classifier\.layers\.(\d+)\.(weight|bias)")
_BENIGN = words("peft_type auto_mapping base_model_name_or_path inference_mode peft_version revision task_type adapters")
_READ = words(
    "hidden_size enable_softmax enable_softmax_topk layerwise_scalings xlora_depth xlora_size xlora_dropout_p top_k_lora "
    "use_trainable_adapters softmax_temperature scaling_pass_value global_scaling_weight"
)


def read_xlora(folder: Path, given: ExpertPool | None, model: nn.Module | None) -> TokenRouter:
    """Return the X-LoRA in a folder as a router, whose attribute `pool` has its adapters: `given`, or those in the folder.

    `model` is the base, needed if the layers have weights of their own. Raises AdapterUnsupported for settings that our
    router computes otherwise and for missing adapters, AdapterCorrupt for damaged files, WeightingError for another pool.
    """
    config, xlora = AdapterConfig.of(folder), router_class("xlora")
    config.check_fields(_BENIGN | _READ, {})
    flags = config.flag("enable_softmax", True), config.flag("enable_softmax_topk")
    top_k, softmax = config.fields.get("top_k_lora"), next(name for name, pair in FLAGS.items() if pair == flags)
    pool = _experts(config, given)
    layers = {name: tuple(adapter.layers) for name, adapter in pool.adapters.items()}
    if other := [name for name in pool.names if set(layers[name]) != set(layers[pool.names[0]])]:
        raise AdapterUnsupported(
            f"{config.folder}: {pool.names[0]!r} and {other[0]!r} update other layers, where PEFT's softmax gives shares to "
            "experts that a layer does not have, and ours does not: make one of such adapters by lw.router('xlora', pool)"
        )
    options: dict[str, Any] = {
        "layerwise": config.flag("layerwise_scalings"),
        "depth": config.count("xlora_depth", 1, most=MAX_DEPTH),
        "size": config.count("xlora_size", 2048),
        "dropout": config.number("xlora_dropout_p", 0.2),
        "top_k": None if top_k is None else config.count("top_k_lora", most=len(pool)),
        # the softmax over the best alone has no temperature in PEFT
        "temperature": 1.0 if softmax == "top_k" else config.number("softmax_temperature", 1.0),
        "softmax": softmax,
        "scaling_pass_value": config.number("scaling_pass_value", 0.0),
        "global_scaling": config.number("global_scaling_weight", 1.0),
        "as_peft": True,
        "hidden_size": config.count("hidden_size"),
    }
    # before any memory is taken
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in xlora(pool, **options).state_dict().items()}
    state = _classifier(config.folder, shapes)
    router = xlora(pool, **options)
    if options["layerwise"]:
        places = _order(config.folder, router, model)
        last = max(state, key=lambda name: int(name.split(".")[1])).split(".")[1]
        rows = torch.cat([len(pool) * places[layer] + torch.arange(len(pool)) for layer in router.layers])
        state |= {f"head.{last}.{part}": state[f"head.{last}.{part}"][rows] for part in ("weight", "bias")}
    router.load_state_dict(state)
    router.pool = pool
    opened: TokenRouter = router.eval()
    return opened


def _experts(config: AdapterConfig, given: ExpertPool | None) -> ExpertPool:
    """Return the adapters that the config names, in its order, from `given` or else from the folder.

    Raises AdapterUnsupported if they are not there, WeightingError if `given` has other ones.
    """
    names = config.table("adapters")
    if not 0 < len(names) <= MAX_EXPERTS:
        raise AdapterCorrupt(f"{config.folder}: adapters are {names!r:.80}, not from 1 to {MAX_EXPERTS} names and paths")
    if given is not None:
        if set(names) <= set(given.names):
            return given.subset(names)
        if len(given) == len(names):
            return given
        raise WeightingError(
            f"{config.folder} is an X-LoRA of the adapters {', '.join(map(repr, names))}, and the pool has {len(given)} "
            "others: give a pool that has these names, or as many adapters in their order"
        )
    try:
        return ExpertPool({str(name): _inner(config.folder, str(place)) for place, name in enumerate(names)})
    except LoraweaveError as error:
        raise AdapterUnsupported(
            f"{config.folder} is an X-LoRA of {len(names)} adapters, which are not in it ({error}); it names "
            f"{dict(names)!r:.80}, and what a file names is not opened: pass them, lw.router(folder, pool=[...])"
        ) from error


def _inner(folder: Path, name: str) -> Adapter:
    return Adapter.from_pretrained(folder_within(folder, name), name=name)


def _classifier(folder: Path, own: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the classifier's tensors by our names. Raises AdapterCorrupt unless they have `own`, {our name: shape}."""
    by_number: dict[int, dict[str, Tensor]] = {}
    for key, _, tensor in stored_tensors(folder):
        if (match := _CLASSIFIER.search(key)) is not None:
            require_finite(tensor, str(folder), repr(key))
            by_number.setdefault(int(match[1]), {})[match[2]] = tensor
    numbers = sorted({int(name.split(".")[1]) for name in own})
    state = {
        f"head.{number}.{part}": tensor
        for number, (_, parts) in zip(numbers, sorted(by_number.items()), strict=False)
        for part, tensor in parts.items()
    }
    if len(by_number) != len(numbers) or {name: tuple(tensor.shape) for name, tensor in state.items()} != own:
        shapes = {
            f"layers.{number}.{part}": tuple(t.shape) for number, parts in by_number.items() for part, t in parts.items()
        }
        raise AdapterCorrupt(
            f"{folder}: the network of this X-LoRA has {shapes!r:.80}, and its config asks for {own!r:.80}. PEFT 0.21 "
            "leaves out of the file each layer of it whose number is also an adapter's name (layers.0 beside adapter '0'): "
            "save internal_xlora_classifier.state_dict() beside the config under its own names"
        )
    return state


def _order(folder: Path, router: Any, model: nn.Module | None) -> dict[str, int]:
    """Return {layer: its index in PEFT's order}, which is that of the model's modules."""
    if model is None:
        raise AdapterUnsupported(
            f"{folder}: layerwise_scalings has weights for each layer in the order of the base's modules, which the files "
            "do not say: pass the base, lw.router(folder, pool, model=model)"
        )
    listed = [name for name, _ in model.named_modules() if name in router.members.layers]
    if missing := sorted(set(router.layers) - set(listed)):
        raise AdapterUnsupported(f"{folder}: the model has no layer {missing[0]!r}, which the adapters update")
    return {name: place for place, name in enumerate(listed)}


def read_arrow(folder: Path) -> TokenRouter:
    """Return the router of a saved model of PEFT's create_arrow_model; its attribute `pool` has the folder's adapters."""
    config = AdapterConfig.of(folder / ARROW)
    settings = AdapterConfig(config.folder, config.table("arrow_config"))
    settings.check_fields(words("top_k router_temperature rng_seed use_gks task_adapter_names gks_adapter_names"), {})
    tasks, general = _names(settings, "task_adapter_names", "task"), _names(settings, "gks_adapter_names", "gks")
    adapters = {name: _inner(folder, name) for name in tasks}
    for name, adapter in adapters.items():
        _require_plain(folder, name, adapter)
    if settings.flag("use_gks"):
        adapters = _without_general(folder, adapters, {name: _inner(folder, name) for name in general})
    options: dict[str, Any] = {"direction": "exact"}
    if settings.fields.get("rng_seed") is None:
        warnings.warn(
            f"{folder}: rng_seed is null, with which PEFT's directions begin at random and differ from run to run; the "
            "exact ones are taken, to which they tend",
            UserWarning,
            stacklevel=3,
        )
    else:
        options = {"direction": "power_iteration", "seed": settings.count("rng_seed", least=0)}
    pool = ExpertPool(adapters)
    options |= {
        "top_k": settings.count("top_k", 3, most=len(pool)),
        "temperature": settings.number("router_temperature", 1.0),
    }
    arrow: Any = router_class("arrow")
    router: TokenRouter = arrow(pool, **options)
    router.pool = pool
    return router.eval()


def _names(settings: AdapterConfig, field: str, kind: str) -> tuple[str, ...]:
    """Return the folder names in a setting: `kind`_0, `kind`_1, .. Raises AdapterUnsupported for any other path."""
    names = settings.names(field)
    if odd := [name for name in names if not re.fullmatch(rf"{kind}_\d+", name)]:
        raise AdapterUnsupported(f"{settings.folder}: {field} has {odd[0]!r}, which is not {kind}_ and a number")
    return names


def _require_plain(folder: Path, name: str, adapter: Adapter) -> None:
    for layer, factors in adapter.layers.items():
        if set(factors.tensors()) != {"a_RI", "b_OR"} or factors.kind != "linear" or adapter.heads or adapter.invocation:
            raise AdapterUnsupported(
                f"{folder}: {name!r} is more than two factors in layer {layer!r}, and PEFT's Arrow computes with lora_A and "
                "lora_B of linear layers alone"
            )


def _without_general(folder: Path, tasks: Mapping[str, Adapter], general: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return the tasks' adapters with the means of the general ones' a and b subtracted (PEFT's GenKnowSub, without scales).

    PEFT subtracts in its first forward, of adapters as they were loaded, and notes nowhere that it did.
    """
    if not general:
        raise AdapterUnsupported(f"{folder}: use_gks is true, and gks_adapter_names has no general adapter")
    scales = {name: _scales(folder / name, adapter) for name, adapter in {**tasks, **general}.items()}
    means: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in next(iter(tasks.values())).layers:
        parts = [
            (adapter.layers[layer], scales[name][layer]) for name, adapter in general.items() if layer in adapter.layers
        ]
        shapes = {(part.a_RI.shape, part.b_OR.shape) for part, _ in parts}
        shapes |= {(a.layers[layer].a_RI.shape, a.layers[layer].b_OR.shape) for a in tasks.values() if layer in a.layers}
        if len(parts) < len(general) or len(shapes) != 1:
            raise AdapterUnsupported(f"{folder}: not all adapters have layer {layer!r} in one rank, as PEFT's Arrow asks")
        a_RI = torch.stack([part.a_RI.double() for part, _ in parts]).mean(dim=0)
        means[layer] = a_RI, torch.stack([part.b_OR.double() / scale for part, scale in parts]).mean(dim=0)
    purified = {}
    for name, adapter in tasks.items():
        layers = {}
        for layer, factors in adapter.layers.items():
            mean_a_RI, mean_b_OR = means[layer]
            b_OR = factors.b_OR.double() - scales[name][layer] * mean_b_OR
            layers[layer] = Factors((factors.a_RI.double() - mean_a_RI).float(), b_OR.float())
        purified[name] = replace(adapter, layers=layers, card={**adapter.card, "general": sorted(general)})
    return purified


def _scales(folder: Path, adapter: Adapter) -> dict[str, float]:
    """Return {layer: alpha / r}, the scale that is part of the adapter's b."""
    return parse_lora(AdapterConfig.of(folder).fields, folder).scales(
        {name: part.rank for name, part in adapter.layers.items()}
    )
