"""The update of one module from the tensors that LoRA files keep of it: LoRA, LoCon's convolutions, LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._base_layers import BaseLayer
from loraweave.hub.formats._conversion import Dense, plain
from loraweave.hub.formats._foreign import Config, Layer
from loraweave.hub.formats._matrices import matrices
from loraweave.hub.formats.loha import Loha
from loraweave.hub.formats.lokr import Lokr
from loraweave.types import Factors

# the tensors of one update, and the axis that has its rank where one alone tells
MATRICES: dict[str, int | None] = {
    "down": 0,
    "up": None,
    "mid": None,
    "hada_w1_b": 0,
    "hada_w1_a": None,
    "hada_w2_a": None,
    "hada_w2_b": None,
    "hada_t1": None,
    "hada_t2": None,
    "lokr_w1_b": 0,
    "lokr_w2_b": 0,
    "lokr_w1": None,
    "lokr_w1_a": None,
    "lokr_w2": None,
    "lokr_w2_a": None,
    "lokr_t2": None,
}


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """The rank of an update, None where nothing in it is of low rank (a Kronecker product of whole matrices)."""
    return next((parts[name].shape[axis] for name, axis in MATRICES.items() if axis is not None and name in parts), None)


def update_of(parts: Mapping[str, Tensor], scale: float, layer: str, base: BaseLayer | None, where: str) -> Factors | Dense:
    """The update, its scale in it. Raises AdapterCorrupt for tensors that are no update together."""
    if {"down", "up"} <= set(parts) <= {"down", "up", "mid"}:
        return _lora(parts, scale, where)
    for layout, prefix in ((Loha, "hada_"), (Lokr, "lokr_")):
        if parts and all(name.startswith(prefix) for name in parts):
            _require_linear(layer, base, where)
            rank = rank_of(parts) or 1
            config = Config(Path(where), {"alpha": scale * rank, "r": rank})
            return layout.update(Layer(layer, where, parts, {}, config, base, None, 1))
    raise AdapterCorrupt(f"{where} has {', '.join(sorted(parts)) or 'no matrices'}, which are not the parts of one update")


def _lora(parts: Mapping[str, Tensor], scale: float, where: str) -> Factors:
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        mid = parts["mid"]
        if down.dim() != 4 or mid.dim() != 4 or max(down.shape[2:]) > 1 or mid.shape[1] != down.shape[0]:
            raise AdapterCorrupt(
                f"{where}: lora_down has shape {tuple(down.shape)} and lora_mid {tuple(mid.shape)}, which are not the first "
                "two of three convolutions in a row"
            )
        # a convolution of width 1 before another is one convolution
        down = torch.einsum("srkl,ri->sikl", mid.double(), down[:, :, 0, 0].double())
    factors = matrices(down, up, False, where)
    return plain(factors.a_RI, factors.b_OR.double() * scale, kind=factors.kind, kernel=factors.kernel)


def _require_linear(layer: str, base: BaseLayer | None, where: str) -> None:
    last = layer.rsplit(".", 1)[-1]
    if base is None and layer.startswith("unet.") and (last.startswith("conv") or last in ("proj_in", "proj_out")):
        raise AdapterUnsupported(
            f"{where}: LoHa and LoKr do not say whether {layer!r} is a convolution, nor of which kernel; give the base "
            "model: Adapter.from_pretrained(..., model=model)"
        )
