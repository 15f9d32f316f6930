"""LoRA on bare parameters (PEFT's `target_parameters`): the experts of a fused parameter, each a layer here.

The update of expert e of parameter p of module m is the layer `m.p.e`, whose factors are of kind "expert". PEFT stores those
of all E experts in two matrices: A (E * R, I), in which an expert's rank rows follow one another, and B (O, R * E), whose
column k * E + e is rank row k of expert e. The scale's rank is R. (O, I) are the sides of one expert's matrix in the
parameter, transposed if the module has `is_transposed` (gpt-oss).

A file names no parameter. PEFT wraps a module once for each, in the order in which the module declares them, so that the
tensors of the last are at `m.lora_A`, and those of the one before at `m.base_layer.lora_A` (peft 0.21, lora/layer.py,
ParamWrapper). Models of transformers declare them in the order of ORDER.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extend.formats import entry

ORDER = ("gate_proj", "gate_up_proj", "up_proj", "down_proj")
WRAPPED = ".base_layer"


def experts_of(parts: Mapping[str, Mapping[str, Tensor]], config: Any) -> dict[str, dict[str, Factors]]:
    """Return {layer of a file that is a target parameter: {its expert's layer: unscaled factors}}.

    Raises AdapterCorrupt for parts that PEFT does not define for a parameter, and what `_parameter_paths` raises.
    """
    experts: dict[str, dict[str, Factors]] = {}
    for layer, path in _parameter_paths(parts, config).items():
        where, held = f"{config.folder}: parameter {path!r}", parts[layer]
        if set(held) != {"a", "b"} or config.use_dora or config.lora_bias or config.recorded["fan_in_fan_out"]:
            raise AdapterCorrupt(
                f"{where} has {', '.join(sorted(held))}, or the config has use_dora, lora_bias or fan_in_fan_out, which "
                "PEFT does not define for a parameter"
            )
        experts[layer] = _split(path, held["a"], held["b"], config.ranks([path])[path], where)
    return experts


def _parameter_paths(parts: Mapping[str, Mapping[str, Tensor]], config: Any) -> dict[str, str]:
    """Return {layer of a file that is a target parameter: the path of that parameter}.

    Raises AdapterUnsupported if the file does not say which it is: if a module has another number of layers below it than
    targeted parameters, or several parameters with names that ORDER does not have; and for a target that is not a parameter
    of several experts, which PEFT ignores, refuses or applies to a single matrix.
    """
    by_module: dict[str, list[str]] = defaultdict(list)
    for layer in parts:
        by_module[_module_of(layer)].append(layer)
    paths: dict[str, str] = {}
    for module, held in by_module.items():
        parameters = _targeted(module, config.target_parameters)
        where = f"{config.folder}: module {module!r}"
        is_alone = held == [module] and f"{WRAPPED}." not in module
        if is_alone and (not parameters or _is_layer(module, parameters, parts[module], config, where)):
            continue
        # the outermost first
        held.sort(key=len)
        if held != [module + depth * WRAPPED for depth in range(len(parameters))]:
            raise AdapterUnsupported(
                f"{where} has {len(held)} updates of parameters, and the config's target_parameters name "
                f"{', '.join(parameters) or 'none'} there, so nothing says which is whose"
            )
        for layer, parameter in zip(held, reversed(_nested(parameters, where)), strict=True):
            paths[layer] = f"{module}.{parameter}"
    _require_parameters(paths, by_module, config)
    return paths


def _is_layer(module: str, own: Mapping[str, bool], held: Mapping[str, Tensor], config: Any, where: str) -> bool:
    """Return True if the one update of a module is of the module itself, and not of a parameter in `own`.

    Raises AdapterUnsupported for a parameter of a module that is a target too, and for one of a single matrix.
    """
    certain = [parameter for parameter, is_certain in own.items() if is_certain]
    listed = config.recorded.get("target_modules")
    # a pattern is never run
    if isinstance(listed, list) and any(type(end) is str and f".{module}".endswith(f".{end}") for end in listed):
        if certain:
            raise AdapterUnsupported(
                f"{where} is one of target_modules, and target_parameters name {certain[0]!r} of it, which PEFT does not "
                "combine: take the name out of target_parameters if the adapter is a plain LoRA"
            )
        return True
    if "a" not in held:
        return not certain
    parameter = next(iter(own))
    path = f"{module}.{parameter}"
    is_single = held["a"].shape[:1] == (config.ranks([path])[path],)
    # for names of ORDER, earlier versions wrote an adapter of only the first expert like this
    if is_single and not (certain and parameter in ORDER):
        raise AdapterUnsupported(
            f"{where} has an update of one matrix, and target_parameters name {parameter!r}, which would not hold several "
            "experts: name the module in the list of target_modules, and parameters by whole paths"
        )
    return False


def _require_parameters(found: Mapping[str, str], modules: Iterable[str], config: Any) -> None:
    """Raise AdapterUnsupported if a target parameter is the path of a module in the file, not of a parameter."""
    for target in config.target_parameters:
        if any(f".{path}".endswith(f".{target}") for path in found.values()):
            continue
        if module := next((module for module in modules if f".{module}".endswith(f".{target}")), None):
            raise AdapterUnsupported(
                f"{config.folder}: target_parameters name {target!r}, which is the module {module!r} and no parameter of "
                "several experts; PEFT would ignore it: take it out of target_parameters if the adapter is a plain LoRA"
            )


def _nested(parameters: Iterable[str], where: str) -> list[str]:
    """Return one module's parameters as PEFT wraps them, innermost first. Raises AdapterUnsupported for an unknown order."""
    names = list(parameters)
    if len(names) > 1 and (unknown := sorted(set(names) - set(ORDER))):
        raise AdapterUnsupported(
            f"{where} has updates of {len(names)} parameters, whose order in a PEFT file is known for {', '.join(ORDER)} "
            f"and not for {unknown[0]!r}; keep each parameter's update as an adapter of its own"
        )
    return sorted(names, key=ORDER.index) if len(names) > 1 else names


def _split(path: str, a: Tensor, b: Tensor, rank: int, where: str) -> dict[str, Factors]:
    """Return each expert's factors of a parameter, unscaled. Raises AdapterCorrupt if R does not divide the matrices."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
        raise AdapterCorrupt(
            f"{where} has A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)}; of E experts of rank r = {rank} they "
            "are (E * r, I) and (O, r * E)"
        )
    experts = a.shape[0] // rank
    return {
        f"{path}.{e}": Factors(a[e * rank : (e + 1) * rank].contiguous(), b[:, e::experts].contiguous(), kind="expert")
        for e in range(experts)
    }


def stack_experts(layers: Mapping[str, Factors]) -> tuple[dict[str, dict[str, Tensor]], dict[str, int], dict[str, int]]:
    """Return PEFT's matrices by wrapper and name, each parameter's rank by path, and the notes for `unpad`.

    All layers are of kind "expert". Ranks are padded to the largest of a parameter, and experts up to its last, with zeros.
    Raises AdapterUnsupported for a layer without a number or with more than two factors, for experts of different sizes, and
    what `_nested` raises.
    """
    by_path: dict[str, dict[int, Factors]] = defaultdict(dict)
    for layer, factors in layers.items():
        path, _, number = layer.rpartition(".")
        if not number.isdecimal() or set(factors.tensors()) != {"a_RI", "b_OR"}:
            raise AdapterUnsupported(f"layer {layer!r} is an expert of a parameter, which has a number and two factors only")
        by_path[path][int(number)] = factors
    ranks = {path: max(1, *[factors.rank for factors in experts.values()]) for path, experts in by_path.items()}
    modules: dict[str, list[str]] = defaultdict(list)
    for path in by_path:
        module, _, parameter = path.rpartition(".")
        modules[module].append(parameter)
    stored: dict[str, dict[str, Tensor]] = {}
    notes: dict[str, int] = {}
    for module, parameters in modules.items():
        for depth, parameter in enumerate(reversed(_nested(parameters, f"module {module!r}"))):
            path = f"{module}.{parameter}"
            a, b = _stack(by_path[path], ranks[path], path, notes)
            stored[module + depth * WRAPPED] = {"lora_A.weight": a, "lora_B.weight": b}
    return stored, ranks, notes


def unpad(layers: Mapping[str, Factors], layout: Mapping[str, Any]) -> dict[str, Factors]:
    """Remove the padding of `stack_experts`: zeros only, so that the notes in a foreign file cannot change a value."""
    notes = entry(layout, "expert_ranks", dict) or {}
    unpadded: dict[str, Factors] = {}
    for layer, factors in layers.items():
        rank = notes.get(layer, factors.rank) if factors.kind == "expert" else factors.rank
        if type(rank) is int and -1 <= rank < factors.rank:
            keep = max(rank, 0)
            if not bool(factors.a_RI[keep:].any()) and not bool(factors.b_OR[:, keep:].any()):
                if rank < 0:
                    continue
                factors = replace(factors, a_RI=factors.a_RI[:keep], b_OR=factors.b_OR[:, :keep].contiguous())
        unpadded[layer] = factors
    return unpadded


def _stack(experts: Mapping[int, Factors], rank: int, path: str, notes: dict[str, int]) -> tuple[Tensor, Tensor]:
    like = next(iter(experts.values()))
    # a file with one matrix for a parameter that is not in ORDER would be refused when read
    least = 1 if path.rpartition(".")[2] in ORDER else 2
    count, num_inputs, num_outputs = max(least, max(experts) + 1), like.a_RI.shape[1], like.b_OR.shape[0]
    if count > 65_536:
        raise AdapterUnsupported(f"parameter {path!r} has an expert {count - 1}; at most 65,536 experts can be written")
    a_ERI, b_ORE = torch.zeros(count, rank, num_inputs), torch.zeros(num_outputs, rank, count)
    for e in range(count):
        factors = experts.get(e)
        expert_rank = -1 if factors is None else factors.rank
        if factors is not None:
            if (factors.b_OR.shape[0], factors.a_RI.shape[1]) != (num_outputs, num_inputs):
                raise AdapterUnsupported(f"the experts of parameter {path!r} have updates of different sizes")
            a_ERI[e, :expert_rank], b_ORE[:, :expert_rank, e] = factors.a_RI, factors.b_OR
        if expert_rank != rank:
            notes[f"{path}.{e}"] = expert_rank
    return a_ERI.flatten(0, 1), b_ORE.flatten(1)


def _module_of(layer: str) -> str:
    while layer.endswith(WRAPPED):
        layer = layer.removesuffix(WRAPPED)
    return layer


def _targeted(module: str, targets: Sequence[str]) -> dict[str, bool]:
    """Return {parameter of the module that PEFT would wrap if it exists: True if it certainly exists}.

    PEFT takes a target as the end of a parameter's path: one without a dot may be a parameter of any module, and every layer
    has a `weight`.
    """
    parameters: dict[str, bool] = {}
    for target in targets:
        parent, _, parameter = target.rpartition(".")
        if parameter and not f".{module}".endswith(f".{target}") and f".{module}.{parameter}".endswith(f".{target}"):
            parameters[parameter] = parameters.get(parameter, False) or bool(parent) or parameter == "weight"
    return parameters
