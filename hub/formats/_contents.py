"""The contents of an adapter's files: an adapter without a name; and the interface of every reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._conversion import MAX_ERROR, Bound
from loraweave.lowrank import algebra
from loraweave.types import Factors, Fingerprint


@dataclass(frozen=True, eq=False)
class Contents:
    """An adapter's layers by module path of the base model, the base's id and fingerprint (if known), the card, and heads.

    The card is JSON. Heads are whole trained tensors by parameter name of the base (PEFT's modules_to_save), fp32. Files lie
    beside the weights and are kept as they are (`_kept_files`). `invocation` is that of an `Adapter`.
    """

    base_model: str
    layers: Mapping[str, Factors]
    fingerprint: Fingerprint | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()

    def require_effect(self, where: str, why: str = "every update is zero") -> None:
        """Raise AdapterUnsupported if the adapter changes nothing."""
        if not self.heads and all(map(algebra.is_zero, self.layers.values())):
            raise AdapterUnsupported(f"{where}: the adapter is without effect: {why}")


def require_numbers(layers: Mapping[str, Factors], heads: Mapping[str, Tensor], where: str) -> None:
    """Raise AdapterCorrupt for values that fp32 cannot hold, AdapterSuspicious for factors whose product it cannot.

    Also raises AdapterUnsupported for tensors of whole numbers.
    """
    tensors = [tensor for factors in layers.values() for tensor in factors.tensors().values()]
    if algebra.within_range([*tensors, *heads.values()]):
        return
    for layer, factors in layers.items():
        for part, tensor in factors.tensors().items():
            _require_finite(f"{where} layer {layer!r}, {part}", tensor)
        algebra.require_in_range(factors, f"{where} layer {layer!r}")
    for head, tensor in heads.items():
        _require_finite(f"{where} head {head!r}", tensor)


def _require_finite(where: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise AdapterUnsupported(
            f"{where} has dtype {tensor.dtype}; only floating point factors have a meaning of their own"
        )
    # as stored: a float64 value can be beyond fp32
    if not algebra.all_finite(values := tensor.float()):
        finite = torch.isfinite(values)
        first = tuple(int(i) for i in (~finite).nonzero()[0])
        raise AdapterCorrupt(
            f"{where}: {int((~finite).sum())} of {tensor.numel()} values are not finite in fp32, the first "
            f"{float(tensor[first])} at {first}"
        )


class Reader(ABC):
    """A format that is only read: an adapter read from it is written as an ordinary LoRA."""

    @classmethod
    def read(
        cls,
        source: Path,
        *,
        model: nn.Module | None = None,
        rank: int | None = None,
        max_error: float = MAX_ERROR,
        allow_pickle: bool = False,
    ) -> Contents:
        """Return the adapter as a plain LoRA. `card["conversion"]` has rank and relative error of every converted layer.

        `model` is the base model: its names and sizes are checked, and types whose file does not determine the update need
        it. Updates that are not of low rank are cut to the smallest rank within `max_error` (Frobenius norm, relative to the
        layer's update) and at most `rank`. Raises AdapterUnsupported if `rank` leaves a larger error, for features without a
        form as factors, and for an adapter without effect; AdapterCorrupt for damaged files; LayerMismatch and
        BaseModelMismatch for another model. A pickle is read only with `allow_pickle`.
        """
        contents = cls._read(Path(source), Bound(rank, max_error), model, allow_pickle)
        contents.require_effect(str(source))
        return contents

    @classmethod
    @abstractmethod
    def _read(cls, source: Path, bound: Bound, model: nn.Module | None, allow_pickle: bool) -> Contents:
        """Return the contents of the folder or file."""
