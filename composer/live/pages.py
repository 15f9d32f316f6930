"""The layout of an adapter's factors where the layers are: a flat tensor for each device and dtype, a view for each part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from loraweave.composer.model.layers import TargetLayer, is_floating
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

# a device and the dtype of a layer there
Place = tuple[torch.device, torch.dtype]

# every part begins at a multiple of these
ALIGNMENT_BYTES = 64
EXACT = ("gain_O", "bias_O")
IN_PLACE: Place = (torch.device("cpu"), torch.float32)


@dataclass(frozen=True, eq=False)
class PlacedFactors:
    """One expert's factors in one layer, on a device in a dtype; gain and bias in fp32 or better.

    All are contiguous, but for b_RO in fp32 on the CPU, which is a view of the adapter's own b_OR.
    """

    a_RI: Tensor
    b_RO: Tensor
    gain_O: Tensor | None = None
    bias_O: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """One tensor of a layer; `offset` counts elements, None for one that stays where the adapter has it."""

    name: str
    shape: tuple[int, ...]
    place: Place
    offset: int | None


class Layout:
    """The places of all parts of an adapter; adapters of one form and the same ranks share it.

    `places` has the device and dtype of each layer that is known; the parts of others are left out. For layers in fp32 on
    the CPU nothing is copied, unless `staged` is true of the CPU, as of other devices.
    """

    def __init__(self, adapter: Adapter, places: Mapping[str, Place], staged: Callable[[torch.device], bool]) -> None:
        self._num_elements: dict[Place, int] = {}
        self._num_bytes: dict[torch.device, int] = {}
        self._layers: dict[str, tuple[Part, ...]] = {}
        self.layers = frozenset(adapter.layers)
        for layer, factors in adapter.layers.items():
            if layer not in places:
                continue
            device, dtype = places[layer]
            parts = []
            for name, tensor in _tensors(factors).items():
                place = (device, torch.promote_types(dtype, torch.float32) if name in EXACT else dtype)
                kept = place == IN_PLACE and not staged(device)
                parts.append(Part(name, tuple(tensor.shape), place, None if kept else self._next(place, tensor)))
                self._num_bytes[device] = self._num_bytes.get(device, 0) + tensor.numel() * place[1].itemsize
            self._layers[layer] = tuple(parts)

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that have a flat tensor."""
        return tuple(self._num_elements)

    def num_bytes(self, wanted: Callable[[torch.device], bool]) -> int:
        """Return the bytes of the parts on the devices that are wanted, including those that stay where they are."""
        return sum(size for device, size in self._num_bytes.items() if wanted(device))

    def make_flats(
        self, adapter: Adapter, wanted: Callable[[torch.device], bool], *, pinned: bool = False
    ) -> dict[Place, Tensor]:
        """Return new flat tensors on the CPU with the adapter's numbers, for the places that are wanted."""
        exact = {place: np.empty(size, np.float32) for place, size in self._num_elements.items() if wanted(place[0])}
        for layer, parts in self._layers.items() if exact else ():
            tensors = _tensors(adapter.layers[layer])
            for part in parts:
                if part.offset is not None and part.place in exact:
                    # numpy turns a matrix round in a tenth of the time that torch takes
                    values = tensors[part.name].to("cpu", torch.float32).numpy()
                    np.copyto(exact[part.place][part.offset : part.offset + values.size].reshape(values.shape), values)
        flats = {}
        for place, flat in exact.items():
            filled = torch.from_numpy(flat)
            if pinned:
                flats[place] = torch.empty(flat.size, dtype=place[1], pin_memory=True).copy_(filled)
            else:
                flats[place] = filled.to(place[1])
        return flats

    def make_views(
        self, flats: Mapping[Place, Tensor], adapter: Adapter | None, wanted: Callable[[torch.device], bool]
    ) -> dict[str, PlacedFactors]:
        """Return each layer's factors as views of the flat tensors; parts that stay where `adapter` has them need it."""
        views = {}
        for layer, parts in self._layers.items():
            if not wanted(parts[0].place[0]):
                continue
            kept = adapter is not None and any(part.offset is None for part in parts)
            adapter_tensors = _tensors(adapter.layers[layer]) if adapter is not None and kept else {}
            tensors: dict[str, Tensor] = {}
            for part in parts:
                if part.offset is None:
                    tensors[part.name] = _keep(adapter_tensors[part.name])
                else:
                    tensors[part.name] = _view(flats[part.place], part.shape, part.offset)
            views[layer] = PlacedFactors(**tensors)
        return views

    def _next(self, place: Place, tensor: Tensor) -> int:
        offset = self._num_elements.get(place, 0)
        step = ALIGNMENT_BYTES // place[1].itemsize
        self._num_elements[place] = offset + math.ceil(tensor.numel() / step) * step
        return offset


def place_factors(factors: Factors, device: torch.device, dtype: torch.dtype) -> PlacedFactors:
    """Return one layer's factors alone, for a layer whose place was not known or has changed."""
    exact = torch.promote_types(dtype, torch.float32)
    gain_O, bias_O = factors.gain_O, factors.bias_O
    return PlacedFactors(
        factors.a_RI.detach().to(device, dtype),
        factors.b_OR.detach().T.to(device, dtype),
        None if gain_O is None else gain_O.detach().to(device, exact),
        None if bias_O is None else bias_O.detach().to(device, exact),
    )


def _tensors(factors: Factors) -> dict[str, Tensor]:
    """Return the factors' tensors by the names of `PlacedFactors`."""
    tensors = {"a_RI": factors.a_RI, "b_RO": factors.b_OR.T}
    if factors.gain_O is not None:
        tensors["gain_O"] = factors.gain_O
    if factors.bias_O is not None:
        tensors["bias_O"] = factors.bias_O
    # factors take no part in training
    return {name: tensor.detach() if tensor.requires_grad else tensor for name, tensor in tensors.items()}


def _keep(tensor: Tensor) -> Tensor:
    kept = tensor.to(*IN_PLACE)
    # one that was read below inference_mode could take no part in a later training step
    return kept.clone() if kept.is_inference() else kept


def _view(flat: Tensor, shape: tuple[int, ...], offset: int) -> Tensor:
    return flat.as_strided(shape, (shape[1], 1) if len(shape) == 2 else (1,), offset)


def find_places(model: nn.Module, layers: Mapping[str, TargetLayer]) -> dict[str, Place]:
    """Return the place of each layer whose place is known before it runs.

    A quantised layer calculates in the dtype of its input, which is taken to be that of the model's first parameter of
    floats; an offloaded one where accelerate brings it.
    """
    places: dict[str, Place] = {}
    dtype: torch.dtype | None = None
    for name, layer in layers.items():
        weight = layer.parameter("weight")
        if weight is None:
            continue
        device = weight.device
        if device.type == "meta":
            moved = getattr(getattr(layer.module, "_hf_hook", None), "execution_device", None)
            if moved is None:
                continue
            device = torch.device(moved)
        if is_floating(weight.dtype):
            places[name] = device, weight.dtype
        else:
            dtype = dtype or next(
                (parameter.dtype for parameter in model.parameters() if is_floating(parameter.dtype)), torch.float32
            )
            places[name] = device, dtype
    return places
