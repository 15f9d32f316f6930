"""Many small tensors as one, with the place of each: a file of one tensor opens as one map instead of hundreds of reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PACKED = "packed"

# more than any factor or head has; a product over a long list of large sizes is slow
_MAX_AXES = 8

Places = list[tuple[str, int, list[int]]]


def pack(tensors: Mapping[str, Tensor]) -> tuple[Places, Tensor]:
    """([name, offset, shape] of each, one fp32 vector that holds all in that order); shares nothing with the input."""
    places: Places = []
    offset = 0
    for name, tensor in tensors.items():
        places.append((name, offset, list(tensor.shape)))
        offset += tensor.numel()
    flat = torch.empty(offset, dtype=torch.float32)
    for name, start, _ in places:
        flat[start : start + tensors[name].numel()] = tensors[name].detach().reshape(-1)
    return places, flat


def unpack(places: Any, flat: Tensor) -> dict[str, Tensor]:
    """The tensors of `pack` by name, as views of `flat`.

    Places come from a file, so all are checked before one is used: whole numbers, none negative, each tensor beginning
    where the one before ends, the last ending where `flat` does, no name twice. Raises ValueError.
    """
    if flat.dtype != torch.float32 or flat.dim() != 1:
        raise ValueError(f"its packed tensor is {flat.dtype} of shape {tuple(flat.shape)}, not a vector of fp32")
    if not isinstance(places, list):
        raise ValueError(f"its table of places is {type(places).__name__}, not a list")
    end, sizes = 0, []
    for place in places:
        name, offset, shape = _checked(place)
        if offset != end:
            raise ValueError(f"tensor {name!r:.60} begins at {offset}, but the one before it ends at {end}")
        sizes.append(math.prod(shape))
        end += sizes[-1]
        if end > flat.shape[0]:
            raise ValueError(f"tensor {name!r:.60} ends at {end}, but the packed tensor has {flat.shape[0]} entries")
    if end != flat.shape[0]:
        raise ValueError(f"its tensors end at {end}, but the packed tensor has {flat.shape[0]} entries")
    # one call for all: a slice of its own for each costs twice as much
    parts = torch.split_with_sizes(flat, sizes) if sizes else ()
    found = {name: part.view(shape) for (name, _, shape), part in zip(places, parts, strict=True)}
    if len(found) != len(places):
        raise ValueError("its table of places has a name twice")
    return found


def _checked(place: Any) -> tuple[str, int, list[int]]:
    if not isinstance(place, list | tuple) or len(place) != 3:
        raise ValueError(f"a place is {place!r:.60}, not [name, offset, shape]")
    name, offset, shape = place
    if not isinstance(name, str) or not isinstance(shape, list) or len(shape) > _MAX_AXES:
        raise ValueError(f"a place is {place!r:.60}, not [name, offset, shape] with at most {_MAX_AXES} axes")
    # a loop: any() over a generator takes three times as long, and there are hundreds of places in a blob
    for number in (offset, *shape):
        if type(number) is not int or not 0 <= number < 2**62:
            raise ValueError(
                f"the place of tensor {name!r:.60} is {place[1:]!r:.60}; an offset or size is not from 0 to 2^62"
            )
    return name, offset, shape
