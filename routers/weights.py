"""Mixture weights: one tensor with four named axes, and the protocol of their makers, the routers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from loraweave.common.names import unknown_expert
from loraweave.errors import ScopeError, WeightingError

LARGEST = torch.finfo(torch.float32).max

RowWeights = Mapping[str, float] | None


@dataclass(frozen=True, eq=False)
class MixtureWeights:
    """The weights of a mixture, values_BTLE, for each instance, token, layer and expert; an axis of size 1 is shared.

    `layers` names the L axis and is empty when that axis has size 1. Values are finite and of any sign.
    Raises WeightingError for values that are not finite or do not fit the names.
    """

    values_BTLE: Tensor
    experts: tuple[str, ...]
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.values_BTLE.shape)
        if len(shape) != 4:
            raise WeightingError(f"mixture weights have the four axes B, T, L, E, but these have shape {shape}")
        if shape[3] != len(self.experts):
            raise WeightingError(
                f"mixture weights have {shape[3]} experts on their last axis, but {len(self.experts)} names"
            )
        if shape[2] != max(len(self.layers), 1):
            raise WeightingError(f"mixture weights have {shape[2]} layers on their axis L, but {len(self.layers)} names")
        if not bool(torch.isfinite(self.values_BTLE).all()):
            where = tuple(int(i) for i in (~torch.isfinite(self.values_BTLE)).nonzero()[0])
            raise WeightingError(
                f"the weight of expert {self.experts[where[3]]!r} at (B, T, L) {where[:3]} is "
                f"{float(self.values_BTLE[where])}; weights must be finite"
            )

    @classmethod
    def of(
        cls, weights: MixtureWeights | Mapping[str, float] | Sequence[RowWeights], experts: Sequence[str]
    ) -> MixtureWeights:
        """Return task-scope weights for {name: weight}, or instance-scope weights for a list with one such mapping per row.

        None in the list is the base model; MixtureWeights are returned unchanged.
        """
        match weights:
            case MixtureWeights():
                return weights
            case Mapping():
                rows: list[RowWeights] = [weights]
            case _:
                rows = list(weights)
        if not rows:
            raise WeightingError("an empty list of mixtures: give one mapping of names to weights for each row")
        position = dict(zip(experts, range(len(experts)), strict=True))
        values_BE = torch.zeros(len(rows), len(position))
        for number, row in enumerate(rows):
            if not (row is None or isinstance(row, Mapping)):
                raise WeightingError(f"row {number} of the mixtures is {row!r}; give {{name: weight}}, or None for the base")
            for name, weight in (row or {}).items():
                if name not in position:
                    raise unknown_expert(name, position)
                values_BE[number, position[name]] = _number(name, weight)
        return cls(values_BE[:, None, None, :], tuple(experts))

    @property
    def num_rows(self) -> int:
        """The number of rows with separate weights; 1 if all rows of a batch share them."""
        return int(self.values_BTLE.shape[0])

    @property
    def scope(self) -> Literal["task", "instance", "token"]:
        if self.values_BTLE.shape[1] > 1:
            return "token"
        return "instance" if self.values_BTLE.shape[0] > 1 else "task"

    def for_layer(self, layer: str) -> Tensor:
        """Return w_BTE of one layer; zeros for a layer that `layers` does not name."""
        if not self.layers:
            return self.values_BTLE[:, :, 0]
        if layer not in self.layers:
            return torch.zeros_like(self.values_BTLE[:, :, 0])
        return self.values_BTLE[:, :, self.layers.index(layer)]

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE, whatever the input."""
        return self.for_layer(layer)

    def as_dict(self) -> dict[str, float]:
        """Return {name: weight} of a task-scope mixture that all layers share. Raises ScopeError for any other."""
        if self.scope != "task" or self.layers:
            raise ScopeError(f"{self.scope} weights of {len(self.layers)} separate layers are not one mapping")
        return {name: float(value) for name, value in zip(self.experts, self.values_BTLE[0, 0, 0], strict=True)}

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Return {layer: {name: weight}} of a task-scope mixture with weights by layer. Raises ScopeError for any other."""
        if self.scope != "task" or not self.layers:
            raise ScopeError(f"{self.scope} weights of {len(self.layers)} separate layers are not by layer")
        return {layer: dict(zip(self.experts, self.for_layer(layer)[0, 0].tolist(), strict=True)) for layer in self.layers}

    @classmethod
    def of_layers(cls, weights: Mapping[str, Mapping[str, float]], experts: Sequence[str]) -> MixtureWeights:
        """Return task scope for {layer: {name: weight}}; experts that a layer does not name get 0 there."""
        rows = [cls.of(of_layer, experts).values_BTLE[0, 0] for of_layer in weights.values()]
        return cls(torch.cat(rows)[None, None], tuple(experts), tuple(weights))

    def means(self) -> dict[str, float]:
        """Return {name: weight} of a task-scope mixture, averaged over its layers. Raises ScopeError for any other scope."""
        if self.scope != "task":
            raise ScopeError(f"weights of {self.scope} scope are not one mapping")
        return dict(zip(self.experts, self.values_BTLE[0, 0].double().mean(dim=0).tolist(), strict=True))


@runtime_checkable
class Router(Protocol):
    """A maker of mixture weights from a layer's input: x_BTI -> w_BTE, where B and T may be 1 (shared).

    A router that reads the model's whole input first also has `begin(model, arguments) -> Router`. It is called with the
    named arguments of each call of the model, while the model answers as the base, and returns the router for that call.
    Inside `begin`, `loraweave.routers.combined.under` makes the model answer with other weights.
    """

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor: ...


@runtime_checkable
class AlongDirections(Protocol):
    """A router that scores inputs by z_BTP = x v^T, their products with P directions v, computed with the experts' products.

    `weights_along(z, x, layer)` equals `weights(x, layer)` up to rounding, with z in the dtype of v. `directions` returns v,
    the same tensor as long as v does not change.
    """

    def directions(self, layer: str) -> Tensor: ...

    def weights_along(self, z_BTP: Tensor, x_BTI: Tensor, layer: str) -> Tensor: ...

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor: ...


def _number(name: str, weight: Any) -> float:
    """Return an expert's weight as a float. Raises WeightingError unless fp32 holds it, or it is NaN or infinite."""
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise WeightingError(
            f"the weight of expert {name!r} is to be learned, and a mapping would cut it off from its gradient: "
            "give MixtureWeights, whose tensor is used as it is"
        )
    try:
        value: float | None = float(weight)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = None
    # float() reads the text "0.5" too, and a weight that is a text is a mistake made elsewhere
    if value is None or isinstance(weight, str) or LARGEST < abs(value) < math.inf:
        raise WeightingError(f"the weight of expert {name!r} is {weight!r}, which is not a number that fp32 holds")
    return value
