"""Whether the base's weights that experts were resolved against (DoRA's magnitude, a trained bias) are still the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.model.layers import TargetLayer
from loraweave.composer.overwritten import row_sums
from loraweave.errors import CompositionError
from loraweave.types import Factors


class BoundWeights:
    """The weights and biases that each expert's gain and bias were calculated from, as they were then."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[_Seal, ...]] = {}
        self._latest: dict[tuple[str, str], _Seal] = {}

    def add(self, expert: str, factors: Mapping[str, Factors], layers: Mapping[str, TargetLayer]) -> None:
        """Remembers what these factors of an expert are about to be calculated from, in place of what it had before."""
        places = [
            (layers[name], part)
            for name, each in factors.items()
            for part, asked in (("weight", each.magnitude_O), ("bias", each.base_bias_O))
            if asked is not None
        ]
        # another mapping, since other threads may be looking at this one
        self._of = {**self._of, expert: tuple(self._seal(layer, part) for layer, part in places)}

    def require_unchanged(self, experts: Iterable[str] | None, *, closely: bool) -> None:
        """Raises CompositionError, naming expert and layer, where one of these experts (None: any) is of other weights.

        Writes that torch counts, and other memory, are always seen; those through `.data` or numpy only where one looks
        `closely`, at one value of every row.
        """
        of = self._of
        if not of:
            return
        for expert in of if experts is None else experts:
            for seal in of.get(expert, ()):
                if not seal.holds(closely=closely):
                    raise CompositionError(
                        f"the {seal.part} of layer {seal.layer.name!r} has changed since expert {expert!r}, which depends "
                        "on it (DoRA's magnitude, a trained bias), was resolved against it: leave every activation, and "
                        "call engine.swap(engine.pool), which takes the base as it is now"
                    )

    def _seal(self, layer: TargetLayer, part: str) -> _Seal:
        found = self._latest.get((layer.name, part))
        if found is None or not found.holds(closely=True):
            found = self._latest[layer.name, part] = _Seal(layer, part)
        return found


class _Seal:
    """The values of one parameter of a layer, or that it has none, by which a change is known."""

    def __init__(self, layer: TargetLayer, part: str) -> None:
        self.layer = layer
        self.part = part
        parameter = layer.parameter(part)
        self._place = _place(parameter)
        self._sample = None if parameter is None else _sample(parameter).clone()
        self._sums = None if parameter is None else row_sums(parameter)

    def holds(self, *, closely: bool) -> bool:
        """Whether the values are the same. A move to another device or dtype is no change."""
        parameter = self.layer.parameter(self.part)
        place = _place(parameter)
        if place == self._place and not closely:
            return True
        if parameter is None or self._sample is None or self._sums is None:
            return place == self._place
        sample = _sample(parameter)
        if not torch.equal(sample, self._sample.to(sample)):
            return False
        if place != self._place:
            if sample.dtype == self._sample.dtype:
                # fused() writes and restores, which torch counts as two changes
                sums = row_sums(parameter)
                if not torch.equal(sums, self._sums.to(sums.device)):
                    return False
            self._place, self._sample, self._sums = place, sample.clone(), row_sums(parameter)
        return True


def _place(parameter: Tensor | None) -> tuple[Any, ...] | None:
    """What differs after every write that torch counts, and for other memory."""
    if parameter is None:
        return None
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device, parameter.shape


def _sample(parameter: Tensor) -> Tensor:
    """One value of every row; of a vector, all."""
    values = parameter.detach()
    if values.ndim < 2:
        return values
    rows_OI = values.flatten(1)
    place_O = torch.arange(len(rows_OI), device=values.device)
    return rows_OI[place_O, place_O % rows_OI.shape[1]]
