"""LoRA files without a config: the tensors' names say what each is, and their scale is stored beside them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extend import (
    AdapterConfig,
    BaseLayer,
    Bound,
    Dense,
    FileFormat,
    StoredLayer,
    cut_update,
    get,
    lora_factors,
    plain_factors,
    words,
)
from loraweave.extensions.adapter_types.formats._placing import BaseNames, Placement, divide

# a small file could ask for a huge matrix by a wide kernel
MAX_KERNEL = 16

# the tensors of one update, and those among them whose first size is its rank
MATRICES = words(
    "down up mid hada_w1_b hada_w1_a hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1_b lokr_w2_b lokr_w1 lokr_w1_a lokr_w2 "
    "lokr_w2_a lokr_t2"
)
RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")

Parts = Mapping[str, Tensor]


class LoraFile(FileFormat):
    """A layout of one file of factors, whose scale is stored beside them."""

    @classmethod
    @abstractmethod
    def place(cls, module: str, base: BaseNames | None, where: str) -> Placement:
        """Return the place of the module in the base. Raises AdapterUnsupported if only a guess could tell."""

    @classmethod
    def scales(cls, held: Mapping[str, Parts], metadata: Mapping[str, str], where: str) -> dict[str, float]:
        """Return alpha / r of each module; 1 without alpha in the file, as in every program that reads such files."""
        return {module: _alpha(parts, where, module) for module, parts in held.items()}

    @classmethod
    def layers(
        cls,
        held: dict[str, dict[str, Tensor]],
        metadata: Mapping[str, str],
        bound: Bound,
        model: nn.Module | None,
        where: str,
    ) -> tuple[dict[str, Factors], dict[str, Any]]:
        """Return the update of every module, under the paths of the base's modules, and the notes of cuts."""
        scales = cls.scales(held, metadata, where)
        base = None if model is None else BaseNames(model)
        layers: dict[str, Factors] = {}
        notes: dict[str, Any] = {}
        for module in list(held):
            # popped one by one, so that the memory of each is freed: the factors are copies
            parts = held.pop(module)
            placement = cls.place(module, base, where)
            whole, note = _factors(module, parts, scales[module], placement, bound, base, where)
            for target, factors in zip(placement.targets, divide(whole, placement, module, where), strict=True):
                path = target if base is None else base.path(target, where)
                if path in layers:
                    raise AdapterCorrupt(f"{where}: several modules are layer {path!r}, one is {module!r}")
                layers[path] = factors if base is None else base.fitted(path, factors, where)
                notes |= {path: note} if note else {}
        return layers, notes


def _alpha(parts: Parts, where: str, module: str) -> float:
    if "alpha" not in parts:
        return 1.0
    alpha = parts["alpha"]
    value = float(alpha.reshape(-1)[0]) if alpha.numel() == 1 else math.nan
    if not math.isfinite(value):
        raise AdapterCorrupt(f"{where}: alpha of {module!r} has shape {tuple(alpha.shape)}, not one number")
    # a Kronecker product of two whole matrices has no rank to divide by, and its trainer takes no scale there
    rank = rank_of(parts)
    return value / rank if rank else 1.0


def _factors(
    module: str, parts: Parts, scale: float, placement: Placement, bound: Bound, base: BaseNames | None, where: str
) -> tuple[Factors, dict[str, Any]]:
    """Return the update as factors, and a note for the card if it was cut or converted."""
    known = None
    if base is not None and len(placement.targets) == 1:
        known = base.layers[base.path(placement.targets[0], where)]
    here = f"{where}: module {module!r}"
    matrices = {name: part for name, part in parts.items() if name != "alpha"}
    update = update_of(matrices, scale, placement.targets[0], known, here)
    if isinstance(update, Factors) and "down" in parts and (bound.rank is None or update.rank <= bound.rank):
        return update, {}
    return cut_update(update, bound, here, known)


def rank_of(parts: Parts) -> int | None:
    """Return the rank of an update, or None if no part of it is of low rank (a Kronecker product of whole matrices)."""
    ranked = (parts[name] for name in RANKED if name in parts)
    # `update_of` refuses a single number, which is not a matrix
    return next((matrix.shape[0] for matrix in ranked if matrix.dim()), None)


def update_of(parts: Parts, scale: float, layer: str, base: BaseLayer | None, where: str) -> Factors | Dense:
    """Return the update, scaled. Raises AdapterCorrupt for tensors that do not form an update."""
    if {"down", "up"} <= set(parts) <= {"down", "up", "mid"}:
        return _lora(parts, scale, where)
    for layout, prefix in (("loha", "hada_"), ("lokr", "lokr_")):
        if parts and all(name.startswith(prefix) for name in parts):
            _require_linear(layer, base, where)
            rank = rank_of(parts) or 1
            config = AdapterConfig(Path(where), {"alpha": scale * rank, "r": rank})
            update: Factors | Dense = get("formats", layout).update(
                StoredLayer(layer, where, parts, {}, config, base, None, 1)
            )
            return update
    raise AdapterCorrupt(f"{where} has {', '.join(sorted(parts)) or 'no matrices'}, which are not the parts of one update")


def _lora(parts: Parts, scale: float, where: str) -> Factors:
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        mid = parts["mid"]
        if down.dim() != 4 or mid.dim() != 4 or max(down.shape[2:]) > 1 or mid.shape[1] != down.shape[0]:
            raise AdapterCorrupt(
                f"{where}: lora_down has shape {tuple(down.shape)} and lora_mid {tuple(mid.shape)}, which are not the first "
                "two of three convolutions in a row"
            )
        if max(mid.shape[2:]) > MAX_KERNEL:
            raise AdapterUnsupported(f"{where}: a kernel of {tuple(mid.shape[2:])}, above the limit of {MAX_KERNEL}")
        # a convolution of width 1 before another is one convolution
        down = torch.einsum("srkl,ri->sikl", mid.double(), down[:, :, 0, 0].double())
    factors = lora_factors(down, up, False, where)
    return plain_factors(factors.a_RI, factors.b_OR.double() * scale, kind=factors.kind, kernel=factors.kernel)


def _require_linear(layer: str, base: BaseLayer | None, where: str) -> None:
    last = layer.rsplit(".", 1)[-1]
    if base is None and layer.startswith("unet.") and (last.startswith("conv") or last in ("proj_in", "proj_out")):
        raise AdapterUnsupported(
            f"{where}: LoHa and LoKr do not say whether {layer!r} is a convolution, nor of which kernel; give the base "
            "model: Adapter.from_pretrained(..., model=model)"
        )
