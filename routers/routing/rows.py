"""Experts that join a router and leave it: the rows of its tensors that are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.layer_tensors import LayerTensors

if TYPE_CHECKING:
    from loraweave.routers.routing.token_router import TokenRouter

R = TypeVar("R", bound="TokenRouter")
# a tensor by its layer, or by no name where there is one for all
Tables = dict[str, Tensor]


def without_rows(router: R, name: str) -> R:
    """A copy without an expert and its rows. All other rows are the same, bit for bit."""
    members, gone = router.members.without(name), router.members.places[name]
    copy = deepcopy(router)
    copy.pool = None if router.pool is None else router.pool.without(name)
    for old, part in zip(router.parts, copy.parts, strict=True):
        part.members = members
        for table, owner in (part.per_expert or {}).items():
            owners = _owners(old, table, owner)
            kept = {layer: rows[owners[layer] != gone] for layer, rows in _tables(old, table).items()}
            _put(part, table, {layer: rows for layer, rows in kept.items() if not layer or layer in members.layers})
        for owner in _owner_tables(part):
            owners = {layer: owner_S[owner_S != gone] for layer, owner_S in _tables(old, owner).items()}
            shifted = {layer: owner_S - (owner_S > gone).to(owner_S.dtype) for layer, owner_S in owners.items()}
            _put(part, owner, {layer: owner_S for layer, owner_S in shifted.items() if layer in members.layers})
        for count in part.counts:
            if (chosen := getattr(part, count)) is not None:
                setattr(part, count, min(chosen, len(members.names)))
    return copy


def with_rows(router: R, name: str, adapter: Adapter) -> R:
    """A copy with one more expert, whose rows are those that a router for it alone has. All other rows are the same."""
    members, place = router.members.including(name, adapter), len(router.experts)
    alone = router.alone(ExpertPool({name: adapter}))
    copy = deepcopy(router)
    copy.pool = None if router.pool is None else router.pool.including(name, adapter)
    for old, new, part in zip(router.parts, alone.parts, copy.parts, strict=True):
        part.members = members
        for table, owner in (part.per_expert or {}).items():
            counts = (place, 1) if owner is None else (0, 0)
            _put(part, table, _joined(_tables(old, table), _tables(new, table), counts))
        for owner in _owner_tables(part):
            later = {layer: owner_S + place for layer, owner_S in _tables(new, owner).items()}
            _put(part, owner, _joined(_tables(old, owner), later, (0, 0)))
    return copy


def _owner_tables(part: TokenRouter) -> list[str]:
    return list(dict.fromkeys(owner for owner in (part.per_expert or {}).values() if owner is not None))


def _owners(part: TokenRouter, table: str, owner: str | None) -> Tables:
    """Whose each row of a table is, as a place among the experts."""
    if owner is not None:
        return _tables(part, owner)
    return {layer: torch.arange(len(rows), device=rows.device) for layer, rows in _tables(part, table).items()}


def _joined(first: Tables, second: Tables, num_rows: tuple[int, int]) -> Tables:
    """The rows of both below each other; for a layer that one of them lacks, so many rows of zeros there."""
    found = {}
    for layer in dict.fromkeys([*first, *second]):
        like = first[layer] if layer in first else second[layer]
        above, below = (
            rows[layer].to(like) if layer in rows else like.new_zeros(count, *like.shape[1:])
            for rows, count in zip((first, second), num_rows, strict=True)
        )
        found[layer] = torch.cat([above, below])
    return found


def _tables(part: TokenRouter, name: str) -> Tables:
    held = getattr(part, name)
    if isinstance(held, LayerTensors):
        return {layer: held[layer].detach() for layer in held}
    return {"": held.detach()}


def _put(part: TokenRouter, name: str, tables: Mapping[str, Tensor]) -> None:
    held = getattr(part, name)
    if not isinstance(held, LayerTensors):
        setattr(part, name, nn.Parameter(tables[""]) if isinstance(held, nn.Parameter) else tables[""])
        return
    for layer in [layer for layer in held if layer not in tables]:
        del held[layer]
    for layer, rows in tables.items():
        held[layer] = rows
