"""The update of one module from the tensors that LoRA files keep of it: LoRA, LoCon's convolutions, LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._base_layer import BaseLayer
from loraweave.hub.formats._config import Config
from loraweave.hub.formats._conversion import Dense, matrices, plain
from loraweave.hub.formats._foreign import Layer
from loraweave.hub.formats.loha import Loha
from loraweave.hub.formats.lokr import Lokr
from loraweave.types import Factors

# a small file could ask for a huge matrix by a wide kernel
MAX_KERNEL = 16

# the tensors of one update, and those among them whose first size is its rank
MATRICES = frozenset(
    {
        "down",
        "up",
        "mid",
        "hada_w1_b",
        "hada_w1_a",
        "hada_w2_a",
        "hada_w2_b",
        "hada_t1",
        "hada_t2",
        "lokr_w1_b",
        "lokr_w2_b",
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_t2",
    }
)
RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """The rank of an update, None where nothing in it is of low rank (a Kronecker product of whole matrices)."""
    ranked = (parts[name] for name in RANKED if name in parts)
    # `update_of` refuses a single number, which is not a matrix
    return next((matrix.shape[0] for matrix in ranked if matrix.dim()), None)


def update_of(parts: Mapping[str, Tensor], scale: float, layer: str, base: BaseLayer | None, where: str) -> Factors | Dense:
    """The update, its scale in it. Raises AdapterCorrupt for tensors that do not form an update."""
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
        if max(mid.shape[2:]) > MAX_KERNEL:
            raise AdapterUnsupported(f"{where}: a kernel of {tuple(mid.shape[2:])}, above the limit of {MAX_KERNEL}")
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
