"""What an adapter must be to be stored: factors that fit each other, finite, with an effect, and of the form asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub import algebra
from loraweave.hub.adapter import Adapter
from loraweave.hub.stored_layers import take_apart
from loraweave.types import Factors


def require_storable(adapter: Adapter, stored_as: str = "factors") -> None:
    """AdapterCorrupt for factors that do not fit each other or are not finite, AdapterUnsupported for no effect at all.

    AdapterSuspicious for factors whose product is beyond fp32. Also AdapterUnsupported for factors that `stored_as` has no
    form for.
    """
    for layer, factors in adapter.layers.items():
        where = f"adapter {adapter.name!r}, layer {layer!r}"
        _require_shapes(where, factors)
        for part, tensor in factors.tensors().items():
            _require_finite(f"{where}, {part}", tensor)
        algebra.require_in_range(factors, where)
    for head, tensor in adapter.heads.items():
        _require_finite(f"adapter {adapter.name!r}, head {head!r}", tensor)
    if not adapter.heads and all(algebra.is_zero(factors) for factors in adapter.layers.values()):
        raise AdapterUnsupported(
            f"adapter {adapter.name!r} is without effect: the updates of all its {len(adapter.layers)} layers are zero; "
            "was it saved before training, or with alpha 0?"
        )
    if stored_as != "factors":
        take_apart(adapter.layers, {}, stored_as=stored_as)


def _require_shapes(where: str, factors: Factors) -> None:
    a, b = tuple(factors.a_RI.shape), tuple(factors.b_OR.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (a[1], b[0]):
        raise AdapterCorrupt(f"{where}: a_RI has shape {a} and b_OR {b}, which do not fit as (rank, in) and (out, rank)")
    vectors = {part: tensor for part, tensor in factors.tensors().items() if part not in ("a_RI", "b_OR")}
    for part, tensor in vectors.items():
        if tuple(tensor.shape) != (b[0],):
            raise AdapterCorrupt(f"{where}: {part} has shape {tuple(tensor.shape)}, but the layer has {b[0]} outputs")
    if a[0] == 0 and not vectors:
        raise AdapterCorrupt(f"{where}: the update has rank 0 and nothing else")


def _require_finite(where: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise AdapterUnsupported(
            f"{where} has dtype {tensor.dtype}; only floating point factors have a meaning of their own"
        )
    # as stored: a float64 value can be beyond fp32
    finite = torch.isfinite(tensor.float())
    if not bool(finite.all()):
        first = tuple(int(i) for i in (~finite).nonzero()[0])
        raise AdapterCorrupt(
            f"{where}: {int((~finite).sum())} of {tensor.numel()} values are not finite in fp32, the first "
            f"{float(tensor[first])} at {first}"
        )
