"""Writers of an X-LoRA or an Arrow router as the folder that PEFT would save, with the adapters in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraweave import Adapter, AdapterUnsupported, ExpertPool
from loraweave.extend import as_path, replacing, require_replaceable
from loraweave.extend.routing import find_names
from loraweave.extend.training import save_tensors

CONFIG, WEIGHTS, ARROW = "adapter_config.json", "adapter_model.safetensors", "arrow_router"
CLASSIFIER = "base_model.internal_xlora_classifier.layers"

# (enable_softmax, enable_softmax_topk) of PEFT, by our softmax
FLAGS = {"all": (True, False), "top_k": (False, True), "twice": (True, True), "none": (False, False)}


def save_as_peft(router: Any, folder: str | Path, pool: ExpertPool, *, model: nn.Module | None = None) -> Path:
    """Write a router `xlora` or `arrow` as the folder that PEFT saves, with the pool's adapters in it; return its path.

    `peft.PeftModel.from_pretrained(base, folder)` opens an X-LoRA there, since its config has the adapters' paths;
    `create_arrow_model` takes the folders of the adapters. `model` is the base, whose order of modules PEFT's layerwise
    weights have. Raises AdapterUnsupported for another router, and for what PEFT lacks: adapters of different layers; a
    temperature in the softmax of `top_k` alone; an Arrow of exact directions, unit inputs, different ranks or more than two
    factors.
    """
    target = as_path(folder, "the folder of a router")
    if router.name == "xlora":
        return _write_xlora(router, target, pool, model)
    if router.name == "arrow":
        return _write_arrow(router, target, pool)
    raise AdapterUnsupported(
        f"PEFT saves routers like 'xlora' and 'arrow', and this is {router.name!r}: save_pretrained() it"
    )


def _write_xlora(router: Any, folder: Path, pool: ExpertPool, model: nn.Module | None) -> Path:
    experts = _experts(router, pool)
    # over all experts it is a plain softmax, with a scaling pass other than PEFT's
    softmax = "all" if router.softmax == "top_k" and router.top_k is None and not router.as_peft else router.softmax
    if softmax == "top_k" and router.temperature != 1:
        raise AdapterUnsupported(
            f"this X-LoRA has temperature={router.temperature:g} in the softmax of its top_k alone, where PEFT has none"
        )
    if not router.as_peft and router.scaling_pass_value and (router.top_k is not None or softmax in ("top_k", "twice")):
        raise AdapterUnsupported(
            f"this X-LoRA has scaling_pass_value={router.scaling_pass_value:g} for all adapters, where PEFT applies top_k "
            "and its softmax, too: train one with as_peft=True, or with a scaling_pass_value of 0"
        )
    enable_softmax, enable_softmax_topk = FLAGS[softmax]
    linears = [module for module in router.head if isinstance(module, nn.Linear)]
    # PEFT has a dropout between layers only where it drops anything
    step = 3 if router.dropout else 2
    tensors = {
        f"{CLASSIFIER}.{step * number}.{part}": tensor
        for number, linear in enumerate(linears)
        for part, tensor in linear.state_dict().items()
    }
    if router.layerwise:
        last = f"{CLASSIFIER}.{step * (len(linears) - 1)}"
        rows = _in_order_of(router, model)
        tensors |= {f"{last}.{part}": tensors[f"{last}.{part}"][rows] for part in ("weight", "bias")}
    target = require_replaceable(folder, lambda path: path.name in (CONFIG, WEIGHTS) or path.name.isdigit()).absolute()
    config = {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": router.members.base_model or None,
        "inference_mode": True,
        # PEFT opens these folders, and knows the adapters by their numbers
        "adapters": {str(place): str(target / str(place)) for place in range(len(experts))},
        "hidden_size": router.hidden_size,
        "enable_softmax": enable_softmax,
        "enable_softmax_topk": enable_softmax_topk,
        "softmax_temperature": router.temperature,
        "layerwise_scalings": router.layerwise,
        "top_k_lora": router.top_k,
        "xlora_depth": router.depth,
        "xlora_size": router.size,
        "xlora_dropout_p": router.dropout,
        "scaling_pass_value": router.scaling_pass_value,
        "global_scaling_weight": router.global_scaling,
        "use_trainable_adapters": False,
    }
    with replacing(target) as new:
        _write(new, config, tensors)
        for place, adapter in enumerate(experts):
            adapter.save_pretrained(new / str(place))
    return folder


def _write_arrow(router: Any, folder: Path, pool: ExpertPool) -> Path:
    experts = _experts(router, pool)
    if router.direction != "power_iteration" or router.input_norm != "none":
        raise AdapterUnsupported(
            f"this Arrow has direction={router.direction!r} and input_norm={router.input_norm!r}, and PEFT's has "
            "'power_iteration' and 'none': make it with those"
        )
    ranks = {factors.rank for adapter in experts for factors in adapter.layers.values()}
    plain = all(set(f.tensors()) == {"a_RI", "b_OR"} and f.kind == "linear" for a in experts for f in a.layers.values())
    if len(ranks) != 1 or not plain:
        raise AdapterUnsupported(f"PEFT's Arrow is of plain adapters of one rank, and these have the ranks {sorted(ranks)}")
    (rank,) = ranks
    names = [f"task_{place}" for place in range(len(experts))]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": router.members.base_model or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in router.layers}),
        "arrow_config": {
            "top_k": router.top_k,
            "router_temperature": router.temperature,
            "rng_seed": router.seed,
            "use_gks": False,
            "task_adapter_names": names,
            "gks_adapter_names": [],
        },
    }
    # the router's own factors, which PEFT makes and never uses
    tensors = {}
    for layer, routed in router.members.layers.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.zeros(rank, routed.num_inputs)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.zeros(routed.num_outputs, rank)
    target = require_replaceable(folder, lambda path: path.name.startswith("task_") or path.name == ARROW)
    with replacing(target) as new:
        (new / ARROW).mkdir()
        _write(new / ARROW, config, tensors)
        for name, adapter in zip(names, experts, strict=True):
            adapter.save_pretrained(new / name)
    return folder


def _experts(router: Any, pool: ExpertPool) -> list[Adapter]:
    """Return the router's adapters in its order. Raises AdapterUnsupported where they update different layers."""
    experts = [pool.adapters[name] for name in find_names(router.members, pool, router.name)]
    every = tuple(range(len(experts)))
    if partly := [layer for layer, routed in router.members.layers.items() if routed.experts != every]:
        raise AdapterUnsupported(
            f"layer {partly[0]!r} is updated by some of the adapters only. PEFT's router weighs all in every layer, and "
            "would give other weights: only adapters of the same layers can be written"
        )
    return experts


def _in_order_of(router: Any, model: nn.Module | None) -> Tensor:
    """Return the indices that put the rows of the network's last linear layer in the order of the model's modules."""
    if model is None:
        raise AdapterUnsupported("PEFT has layerwise weights in the order of the base's modules: pass model=")
    count, places = len(router.experts), {name: place for place, name in enumerate(router.layers)}
    listed = [name for name, _ in model.named_modules() if name in places]
    if len(listed) < len(places):
        raise AdapterUnsupported(f"the model has {len(listed)} of the router's {len(places)} layers: pass its own base")
    return torch.cat([count * places[name] + torch.arange(count) for name in listed])


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_tensors(copies, folder / WEIGHTS, metadata={"format": "pt"})
