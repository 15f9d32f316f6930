"""Weights that a call made are numbers, or are refused: at once on a CPU, elsewhere when their activation ends."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.errors import WeightingError


class MadeWeights:
    """Looks over what one activation's calls make of their input, or of parameters, for `experts`.

    A GPU is not asked before the end: it sums zeros, which are no number once a weight was none.
    """

    def __init__(self, experts: tuple[str, ...]) -> None:
        self._experts = experts
        self._zeros: dict[str, Tensor] = {}

    def require_finite(self, layer: str, w_BTE: Tensor) -> None:
        """Raises WeightingError for a weight on the CPU that is not finite; one elsewhere is noted for `require_all`."""
        if torch._C._are_functorch_transforms_active() or w_BTE.is_meta:
            return
        w_BTE = w_BTE.detach()
        if w_BTE.device.type != "cpu":
            zero = (w_BTE * 0).sum()
            known = self._zeros.get(layer)
            self._zeros[layer] = zero if known is None or known.device != zero.device else known + zero
        # the sum of finite weights is finite unless it overflows, and takes one pass
        elif not bool(w_BTE.sum().isfinite()) and not bool(w_BTE.isfinite().all()):
            expert = int((~w_BTE.isfinite()).flatten(0, 1).any(dim=0).int().argmax())
            raise WeightingError(self._message(layer, f", first for expert {self._experts[expert]!r}"))

    def require_all(self) -> None:
        """Raises WeightingError, once, for weights noted so far; waits for the devices that they are on."""
        zeros, self._zeros = self._zeros, {}
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for layer, zero in zeros.items():
            by_device.setdefault(zero.device, {})[layer] = zero
        for found in by_device.values():
            sound = torch.stack([zero.float() for zero in found.values()]).isfinite().tolist()
            for layer, finite in zip(found, sound, strict=True):
                if not finite:
                    raise WeightingError(self._message(layer, ""))

    @staticmethod
    def _message(layer: str, where: str) -> str:
        return (
            f"the weights that were made for layer {layer!r} are not finite{where}: look at the router's parameters, or "
            "lower the rate at which the weights learn"
        )
