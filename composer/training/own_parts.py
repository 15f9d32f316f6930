"""What each task added to a model that is a sum of updates, task after task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from loraweave.errors import LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


def own_parts(adapters: Mapping[str, Adapter], *, start: Adapter | None = None) -> dict[str, Adapter]:
    """{task: the update that it added}, of the prefix sums that `train_adapters(..., continual=...)` gives, in their order.

    Summed from the start on they are those prefixes, bit for bit. For `construct_vl`, `inflora`, `gs_lora` and an untuned
    `task_arithmetic`; raises LayerMismatch for adapters that are no prefixes of each other.
    """
    found, before = {}, {} if start is None else dict(start.layers)
    for name, adapter in adapters.items():
        layers = {layer: _beyond(name, layer, before.get(layer), factors) for layer, factors in adapter.layers.items()}
        found[name] = replace(adapter, layers={layer: own for layer, own in layers.items() if own.rank})
        before = dict(adapter.layers)
    return found


def _beyond(name: str, layer: str, before: Factors | None, after: Factors) -> Factors:
    """The rank rows of `after` beyond those of `before`."""
    if before is None:
        return after
    rank = before.rank
    if not (torch.equal(after.a_RI[:rank], before.a_RI) and torch.equal(after.b_OR[:, :rank], before.b_OR)):
        raise LayerMismatch(
            f"the adapter of task {name!r} does not begin with the one before it in layer {layer!r}: it is no sum of "
            "updates, so nothing of it belongs to one task alone"
        )
    return replace(after, a_RI=after.a_RI[rank:].clone(), b_OR=after.b_OR[:, rank:].clone())
